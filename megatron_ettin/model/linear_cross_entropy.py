"""Output layer and cross-entropy in one, by chunks: the logits of a micro-batch never exist whole.

With 50,368 columns the logits and their gradient are the largest tensors of a small model by far.
Here a chunk of positions goes from its hidden states to its loss and on to its gradients before the
next one begins. Nothing is computed twice: the gradient of a *sum* of losses is known as soon as a
chunk's softmax is (as in Liger-Kernel's fused linear cross-entropy), so that the backward pass only
scales. The columns may be divided over tensor-parallel ranks, as in Megatron-Core's
`vocab_parallel_cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup

#: Bytes of a chunk's logits, in the parameters' type. On a CPU a product of 500 positions and more
#: runs at its full speed, and fewer chunks mean fewer sums of the weight's gradient. On a GPU, for
#: each column c positions move 14 c bytes (as cross_entropy_triton.py counts), and a chunk moves
#: 12 * hidden_size more: weights that are read twice, their gradient that is read and written. With
#: the 10,659 positions of 1 GiB in bfloat16 that is 2 % more at 17M, and 14 % at 1B, where products
#: take longer than bytes; and the tiles of a product go more than 100 times around a GPU, so that
#: its last round costs nothing.
CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**30}
#: On a CPU, bytes of the logits in float32 that become a gradient together: they stay in its cache
#: from the first of eight passes to the last.
BLOCK_BYTES = 2**22


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
        labels: [n] int64, below vocab_size; -1 at a position that only fills up a fixed shape: its
            loss is 0 and it adds to no gradient.
        vocab_size: columns of the whole vocabulary from here on are padding: no probability.
        group: the tensor-parallel ranks, which hold the columns in the order of their ranks.
        chunk_positions: positions of a chunk; what fits in CHUNK_BYTES if not given.
    """
    if chunk_positions is None:
        row_bytes = hidden.element_size() * weight.shape[0]
        chunk_positions = max(1, CHUNK_BYTES[hidden.device.type] // row_bytes)
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
            logits = torch.addmm(bias, hidden[chunk], weight.t())
            for block in _blocks(logits):
                losses[chunk][block] = _losses_(
                    logits[block], labels[chunk][block], first, real, group, gradients is not None
                )
            if gradients is not None:
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
        # Of no position there is none; the first chunk's is made by its product.
        self.weight = torch.zeros_like(weight) if not len(hidden) else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32)

    def add(
        self, chunk: slice, hidden: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor
    ) -> None:
        """Add those of a chunk, given the gradient of its logits [c, columns]."""
        self.bias += logits.sum(dim=0, dtype=torch.float32)
        torch.mm(logits, weight, out=self.hidden[chunk])
        if self.weight is None:
            self.weight = logits.t() @ hidden
        elif self.dtype == torch.float32:
            self.weight.addmm_(logits.t(), hidden)
        elif hidden.is_cuda:
            # Summed where it is, in float32; only CUDA has a product of two types.
            into = self.weight = self.weight.float()
            torch.addmm(into, logits.t(), hidden, out_dtype=torch.float32, out=into)
        else:
            self.weight = self.weight.float() + logits.t() @ hidden

    def scaled(self, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return them times `scale`, in the parameters' type; they are used up."""
        assert self.weight is not None
        return tuple(x.mul_(scale).to(self.dtype) for x in (self.hidden, self.weight, self.bias))


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    """Yield the positions of a chunk that are worked on together: on a GPU, all of them."""
    positions = len(logits)
    if not logits.is_cuda:
        positions = max(1, BLOCK_BYTES // (4 * logits.shape[1]))
    for begin in range(0, len(logits), positions):
        yield slice(begin, begin + positions)


def _losses_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    real: int,
    group: ProcessGroup,
    to_gradient: bool,
) -> torch.Tensor:
    """Return the losses [c] of logits [c, columns], which `to_gradient` makes their gradient."""
    wide = logits if logits.is_cuda else logits.float()
    mine = _statistics_(wide, labels, first, real)
    losses, share = _over_ranks(mine, labels, group)
    if to_gradient:
        _gradient_(wide, labels, first, real, mine[0], share)
        if wide is not logits:
            logits.copy_(wide)
    return losses


def _statistics_(logits: torch.Tensor, labels: torch.Tensor, first: int, real: int) -> torch.Tensor:
    """Return [3, c] float32: highest logit, sum of exp(logit - highest), the label's logit.

    All of this rank's columns, which are `first`, ..., and of which `real` are no padding. The
    label's logit is 0 where another rank has it. On a CPU, logits [c, columns] float32 become
    exp(logit - highest); on a GPU, where an exponential is cheaper than its bytes, they stay.
    """
    if logits.is_cuda:
        from megatron_ettin.model.cross_entropy_triton import statistics

        return statistics(logits, labels, first, real)
    logits[:, real:] = float("-inf")
    # Not -inf where all columns are padding: (-inf) - (-inf) is no number.
    peak = logits.amax(dim=1).clamp_(min=torch.finfo(logits.dtype).min)
    column, owned = _columns(logits, labels, first)
    label = logits.gather(1, column)[:, 0].where(owned, 0.0)
    total = logits.sub_(peak[:, None]).exp_().sum(dim=1)
    return torch.stack([peak, total, label])


def _gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    real: int,
    peak: torch.Tensor,
    share: torch.Tensor,
) -> None:
    """Turn what `_statistics_` left of the logits into softmax minus one-hot, in place.

    A probability is share [c] * exp(logit - peak [c]).
    """
    if logits.is_cuda:
        from megatron_ettin.model.cross_entropy_triton import gradient_

        gradient_(logits, labels, first, real, peak, share)
        return
    logits.mul_(share[:, None])
    # A label of another rank's column changes nothing here.
    column, owned = _columns(logits, labels, first)
    logits.scatter_add_(1, column, -owned[:, None].float())


def _columns(
    logits: torch.Tensor, labels: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the labels' columns [c, 1], and [c] whether they are this rank's."""
    columns = logits.shape[1]
    owned = (labels >= first) & (labels < first + columns)
    return (labels - first).clamp_(0, columns - 1)[:, None], owned


def _over_ranks(
    mine: torch.Tensor, labels: torch.Tensor, group: ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses [c], and [c] by what exp(logit - this rank's peak) is a probability.

    Both are 0 where a label is -1. `mine` [3, c] are this rank's statistics.
    """
    peak, total, label = mine
    if group.size() > 1:
        every = mine.new_empty((group.size(), *mine.shape))
        torch.distributed.all_gather(list(every.unbind()), mine, group=group)
        peaks, totals, values = every.unbind(dim=1)
        peak = peaks.amax(dim=0)
        total = (totals * (peaks - peak).exp()).sum(dim=0)
        label = values.sum(dim=0)
    filler = labels < 0
    losses = (peak + total.log() - label).masked_fill_(filler, 0.0)
    share = ((mine[0] - peak).exp() / total).masked_fill_(filler, 0.0)
    return losses, share
