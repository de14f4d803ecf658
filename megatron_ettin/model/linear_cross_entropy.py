"""Output layer and cross-entropy in one, by chunks: the logits of a micro-batch never exist whole.

With 50,368 columns the logits and their gradient are by far the largest tensors of a small model.
Here one chunk of positions goes from hidden states through its loss to its gradients before the
next chunk begins. Nothing is computed twice: as soon as a chunk's softmax is known, so is the
gradient of the *sum* of losses (as in Liger-Kernel's fused linear cross-entropy), and the backward
pass only scales it. Columns may be sharded over tensor-parallel ranks, as in Megatron-Core's
`vocab_parallel_cross_entropy`.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup

#: Bytes of a chunk's logits, in the parameters' type. On a CPU a matmul reaches its full speed from
#: 500 positions on, and fewer chunks mean fewer additions to the weight's gradient. On a GPU, for
#: each column, c positions move 14 c bytes (counted in cross_entropy_triton.py). A chunk moves 12 *
#: hidden_size bytes more: weights are read twice, their gradient is read and written. With the
#: 10,659 positions of 1 GiB in bfloat16 that is 2 % more at 17M and 14 % more at 1B, where matmuls
#: are bound by arithmetic anyway. A matmul of that size fills a GPU more than 100 times, so that a
#: partly filled last wave costs under 1 %.
CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**30}
#: Bytes of float32 logits that a CPU turns into a gradient at a time: they stay in its cache during
#: all eight passes over them.
BLOCK_BYTES = 2**22


class SummedLoss(NamedTuple):
    """The loss of the scored positions of a micro-batch."""

    total: torch.Tensor
    """[] float32, differentiable."""
    by_position: torch.Tensor
    """[n] float32, weighted, for reports; not differentiable."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int,
    group: ProcessGroup,
    weights: torch.Tensor | None = None,
    chunk_positions: int | None = None,
) -> SummedLoss:
    """Return the cross-entropy of `hidden @ weight.T + bias` against `labels`, summed.

    Args:
        hidden: [n, hidden_size], equal on all ranks of `group`.
        weight: [columns, hidden_size], this rank's columns of the padded vocabulary.
        bias: [columns]
        labels: [n] int64, below vocab_size. A position with -1 only fills up a fixed shape: its
            loss is 0 and it adds to no gradient.
        vocab_size: number of real columns in the whole vocabulary; later ones are padding and get
            no probability.
        group: tensor-parallel ranks, which hold the columns in the order of their ranks.
        weights: [n] float32 factors of the positions' losses; 1 if not given.
        chunk_positions: positions of a chunk; as many as fit in CHUNK_BYTES if not given.
    """
    if chunk_positions is None:
        row_bytes = hidden.element_size() * weight.shape[0]
        chunk_positions = max(1, CHUNK_BYTES[hidden.device.type] // row_bytes)
    total, by_position = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, weights, vocab_size, group, chunk_positions
    )
    return SummedLoss(total, by_position)


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses and their gradients, computed together in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor | None,
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
                    logits[block],
                    labels[chunk][block],
                    None if weights is None else weights[chunk][block],
                    first,
                    real,
                    group,
                    gradients is not None,
                )
            if gradients is not None:
                gradients.add(chunk, hidden[chunk], weight, logits)
        ctx.gradients = gradients
        if gradients is not None and group.size() > 1:
            # Each rank holds the gradient through its own columns; hidden states need the sum.
            torch.distributed.all_reduce(gradients.hidden, group=group)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        hidden, weight, bias = gradients.scaled(scale)
        return hidden, weight, bias, None, None, None, None, None


class _Gradients:
    """Gradients of the summed loss; those of weight and bias are accumulated in float32."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.dtype = weight.dtype
        self.hidden = torch.empty_like(hidden)
        # Allocated only if no position is scored; otherwise the first chunk's matmul creates it.
        self.weight = torch.zeros_like(weight) if not len(hidden) else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32)

    def add(
        self, chunk: slice, hidden: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor
    ) -> None:
        """Add the gradients of a chunk, given the gradient of its logits [c, columns]."""
        self.bias += logits.sum(dim=0, dtype=torch.float32)
        torch.mm(logits, weight, out=self.hidden[chunk])
        if self.weight is None:
            self.weight = logits.t() @ hidden
        elif self.dtype == torch.float32:
            self.weight.addmm_(logits.t(), hidden)
        elif hidden.is_cuda:
            # Accumulated in place, in float32. Only CUDA has matmuls with bfloat16 factors and a
            # float32 result.
            into = self.weight = self.weight.float()
            torch.addmm(into, logits.t(), hidden, out_dtype=torch.float32, out=into)
        else:
            self.weight = self.weight.float() + logits.t() @ hidden

    def scaled(self, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradients times `scale`, in the parameters' type; call it once."""
        assert self.weight is not None
        return tuple(x.mul_(scale).to(self.dtype) for x in (self.hidden, self.weight, self.bias))


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    """Yield slices of a chunk's positions: blocks of BLOCK_BYTES on a CPU, one for all on a GPU."""
    positions = len(logits)
    if not logits.is_cuda:
        positions = max(1, BLOCK_BYTES // (4 * logits.shape[1]))
    for begin in range(0, len(logits), positions):
        yield slice(begin, begin + positions)


def _losses_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    first: int,
    real: int,
    group: ProcessGroup,
    to_gradient: bool,
) -> torch.Tensor:
    """Return the losses [c] of logits [c, columns], times the weights [c] if there are any.

    `to_gradient` makes gradients of the logits.
    """
    wide = logits if logits.is_cuda else logits.float()
    mine = _statistics_(wide, labels, first, real)
    losses, share = _over_ranks(mine, labels, group)
    if to_gradient:
        _gradient_(wide, labels, first, real, mine[0], share)
        if weights is not None:
            wide.mul_(weights[:, None])
        if wide is not logits:
            logits.copy_(wide)
    return losses if weights is None else losses.mul_(weights)


def _statistics_(logits: torch.Tensor, labels: torch.Tensor, first: int, real: int) -> torch.Tensor:
    """Return [3, c] float32: highest logit, sum of exp(logit - highest), the label's logit.

    They cover this rank's columns, from number `first` on, of which the first `real` are no
    padding. If another rank holds a label's column, its logit here is 0. On a CPU, logits [c,
    columns] float32 become exp(logit - highest). On a GPU they stay: an exponential is cheaper than
    writing it.
    """
    if logits.is_cuda:
        from megatron_ettin.model.cross_entropy_triton import statistics

        return statistics(logits, labels, first, real)
    logits[:, real:] = float("-inf")
    # If all columns are padding, the peak must not be -inf: (-inf) - (-inf) is NaN.
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
    """Turn the logits, as `_statistics_` left them, into softmax minus one-hot, in place.

    A probability is share [c] * exp(logit - peak [c]).
    """
    if logits.is_cuda:
        from megatron_ettin.model.cross_entropy_triton import gradient_

        gradient_(logits, labels, first, real, peak, share)
        return
    logits.mul_(share[:, None])
    # scatter_add_ of 0 where another rank holds the label: no branch, and so no wait for its value.
    column, owned = _columns(logits, labels, first)
    logits.scatter_add_(1, column, -owned[:, None].float())


def _columns(
    logits: torch.Tensor, labels: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the labels' columns on this rank [c, 1], clamped, and [c] True where it has them."""
    columns = logits.shape[1]
    owned = (labels >= first) & (labels < first + columns)
    return (labels - first).clamp_(0, columns - 1)[:, None], owned


def _over_ranks(
    mine: torch.Tensor, labels: torch.Tensor, group: ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses [c], and factors [c] that turn exp(logit - own peak) into probabilities.

    Both are 0 where a label is -1. `mine` [3, c] holds this rank's statistics.
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
