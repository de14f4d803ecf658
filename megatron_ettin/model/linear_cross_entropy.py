"""Output layer and cross-entropy in one, by chunks: the logits of a micro-batch never exist whole.

With 50,368 columns the logits and their gradient are the largest tensors of a small model by far.
Here a chunk of positions goes from its hidden states to its loss and on to its gradients before the
next one begins. Nothing is computed twice: the gradient of a *sum* of losses is known as soon as a
chunk's softmax is (as in Liger-Kernel's fused linear cross-entropy), so that the backward pass only
scales. The columns may be divided over tensor-parallel ranks, as in Megatron-Core's
`vocab_parallel_cross_entropy`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup

#: Bytes of a chunk's logits in float32. On a CPU, chunks of 128 to 1024 positions of 50,368 columns
#: are about equally fast, 1.3 to 1.7 times as fast as all at once; a GPU needs more at a time.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}


class SummedLoss(NamedTuple):
    """The loss of the scored positions of a micro-batch."""

    total: torch.Tensor
    """[] float32; carries the gradient."""
    by_position: torch.Tensor
    """[n] float32; for reports, carries none."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int,
    group: ProcessGroup,
    chunk_positions: int | None = None,
) -> SummedLoss:
    """Return the cross-entropy of `hidden @ weight.T + bias` against `labels`, summed.

    Args:
        hidden: [n, hidden_size], equal on all ranks of `group`.
        weight: [columns, hidden_size], this rank's columns of the padded vocabulary.
        bias: [columns]
        labels: [n] int64, below vocab_size.
        vocab_size: columns of the whole vocabulary from here on are padding: no probability.
        group: the tensor-parallel ranks, which hold the columns in the order of their ranks.
        chunk_positions: positions of a chunk; what fits in CHUNK_BYTES if not given.
    """
    if chunk_positions is None:
        chunk_positions = max(1, CHUNK_BYTES[hidden.device.type] // (4 * weight.shape[0]))
    total, by_position = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, vocab_size, group, chunk_positions
    )
    return SummedLoss(total, by_position)


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses and gradients chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        group: ProcessGroup,
        chunk_positions: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        columns = weight.shape[0]
        first = group.rank() * columns
        real = min(max(vocab_size - first, 0), columns)
        gradients = _Gradients(hidden, weight, bias) if any(ctx.needs_input_grad) else None
        losses = hidden.new_empty(len(labels), dtype=torch.float32)
        for begin in range(0, len(labels), chunk_positions):
            chunk = slice(begin, begin + chunk_positions)
            logits = torch.addmm(bias, hidden[chunk], weight.t()).float()
            logits[:, real:] = float("-inf")
            owned = (labels[chunk] >= first) & (labels[chunk] < first + columns)
            column = (labels[chunk] - first).clamp_(0, columns - 1)[:, None]
            losses[chunk] = _softmax_(logits, column, owned, group)
            if gradients is not None:
                # Softmax minus one-hot; a label of another rank's column changes nothing here.
                logits.scatter_add_(1, column, -owned[:, None].float())
                gradients.add(chunk, hidden[chunk], weight, logits)
        ctx.gradients = gradients
        if gradients is not None and group.size() > 1:
            torch.distributed.all_reduce(gradients.hidden, group=group)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        hidden, weight, bias = gradients.scaled(scale)
        return hidden, weight, bias, None, None, None, None


class _Gradients:
    """Gradients of the sum of losses. Those of the weights are summed over chunks in float32."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.dtype = weight.dtype
        self.hidden = torch.empty_like(hidden)
        self.weight = torch.zeros_like(weight, dtype=torch.float32)
        self.bias = torch.zeros_like(bias, dtype=torch.float32)

    def add(
        self, chunk: slice, hidden: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor
    ) -> None:
        """Add those of a chunk, given the gradient of its logits [c, columns] float32."""
        self.bias += logits.sum(dim=0)
        narrow = logits.to(self.dtype)
        torch.mm(narrow, weight, out=self.hidden[chunk])
        if self.dtype == torch.float32:
            self.weight.addmm_(narrow.t(), hidden)
        else:
            self.weight += narrow.t() @ hidden

    def scaled(self, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return them times `scale`, in the parameters' type; they are used up."""
        return tuple(x.mul_(scale).to(self.dtype) for x in (self.hidden, self.weight, self.bias))


def _softmax_(
    logits: torch.Tensor, column: torch.Tensor, owned: torch.Tensor, group: ProcessGroup
) -> torch.Tensor:
    """Turn logits [c, columns] into probabilities in place; return the losses [c].

    `column` [c, 1] is the label's column where this rank has it (`owned`).
    """
    lowest = torch.finfo(logits.dtype).min
    # Not -inf where all columns are padding: (-inf) - (-inf) is no number.
    peak = logits.amax(dim=1).clamp_(min=lowest)
    label = logits.gather(1, column)[:, 0].where(owned, 0.0)
    total = logits.sub_(peak[:, None]).exp_().sum(dim=1)
    if group.size() > 1:
        mine = torch.stack([peak, total, label])
        every = mine.new_empty((group.size(), *mine.shape))
        torch.distributed.all_gather(list(every.unbind()), mine, group=group)
        peaks, totals, labels = every.unbind(dim=1)
        highest = peaks.amax(dim=0)
        total = (totals * (peaks - highest).exp()).sum(dim=0)
        logits.mul_(((peak - highest).exp() / total)[:, None])
        peak, label = highest, labels.sum(dim=0)
    else:
        logits.div_(total[:, None])
    return peak + total.log() - label
