"""AdamW and StableAdamW over the shards of a rank, in blocks that keep temporary memory small.

AdamW: Loshchilov and Hutter 2019 (arXiv 1711.05101), with the semantics of torch.optim.AdamW.
StableAdamW: Wortsman et al. 2023 (arXiv 2304.13013), in the form of ModernBERT's
`src/optimizer.py`.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_ettin.training.block_optimizer import Block, BlockOptimizer

#: One factor for all slices of a block, or a tensor for each: a scalar, or in its slice's shape.
Factor = float | list[torch.Tensor]


class AdamW(BlockOptimizer):
    """torch's AdamW: a step shrinks weights by lr * weight_decay, then moves them by the moments.

    The moments are averages without bias; torch keeps biased ones and divides at every step.
    """

    moments = ("exp_avg", "exp_avg_sq")

    def update(self) -> None:
        """Update moments and weights; the groups hold the number of this step already."""
        for block in self.blocks():
            lr = block.group["lr"]
            advance_moments(block)
            move_weights(block, rate=lr, keep=1.0 - lr * block.decay)


@dataclass(frozen=True, kw_only=True)
class TensorStatistics:
    """Table by which the shards on this rank add up to logical tensors."""

    tensor_index: dict[int, int]
    """Logical tensor of each shard, by the shard's id."""
    counted: dict[int, bool]
    """True for each shard, by id, that counts in the sums: one of the copies that tensor-parallel
    ranks hold of a replicated tensor."""
    numel: torch.Tensor
    """[tensors] float64, sizes of the whole tensors."""
    group: torch.distributed.ProcessGroup
    """Ranks that hold shards of the same tensors; their sums are all-reduced."""


class _Slices(NamedTuple):
    """Tables from the slices of a step to logical tensors."""

    shards: list[int]
    """Shard that contains each slice, by id."""
    tensor_index: torch.Tensor
    """[slices] int64, logical tensor of each slice."""
    foreign: torch.Tensor
    """[tensors, slices] bool, False where a slice counts in a tensor's statistics."""
    elements: torch.Tensor
    """[slices] int64, sizes of the slices."""


class StableAdamW(AdamW):
    """AdamW with a per-tensor learning rate of lr / max(1, RMS) and fully decoupled decay.

    RMS = sqrt(mean(g^2 / max(v, eps^2))) over the *whole* logical tensor: fused QKV and GLU are one
    tensor each, the tied embedding counts once. A step shrinks weights by weight_decay * (lr of the
    tensor) / peak lr.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """Build the optimizer; `lr` is the peak that decay is relative to.

        Groups have a `wd_mult`. `statistics` must be set before the first step.
        """
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.peak_lr = lr
        self.statistics: TensorStatistics | None = None
        self._slices: _Slices | None = None

    def update(self) -> None:
        """Update moments and weights; the ranks of `statistics.group` call this together."""
        blocks = list(self.blocks())
        ends = itertools.accumulate(len(block.shards) for block in blocks)
        # places[i]: the range of block i in vectors [slices] over all blocks.
        places = [slice(end - len(b.shards), end) for b, end in zip(blocks, ends, strict=True)]
        slices = self._slices_of(blocks)
        # One tensor: kept norms would lie between the blocks' temporary memory and fragment it.
        norms = self._statistics.numel.new_empty(len(slices.shards))
        # Two passes over the blocks: no weight may move before the norms of all slices of its
        # tensor are known, on this rank and on the others.
        for block, place in zip(blocks, places, strict=True):
            advance_moments(block)
            norms[place] = torch.stack(_normalised_gradient_norms(block))
        damping = self._damping(slices, norms)
        for block, place in zip(blocks, places, strict=True):
            rates = block.group["lr"] / damping[place]
            keep = 1.0 - rates * (block.decay / self.peak_lr)
            elements = slices.elements[place]
            move_weights(
                block, rate=_spread(rates, elements, block), keep=_spread(keep, elements, block)
            )

    @property
    def _statistics(self) -> TensorStatistics:
        assert self.statistics is not None, "StableAdamW.statistics is not set"
        return self.statistics

    def _damping(self, slices: _Slices, norms: torch.Tensor) -> torch.Tensor:
        """Return [slices] float32: max(1, RMS) of each slice's logical tensor.

        `norms` [slices] float64 are those of g / max(sqrt(v), eps) over each slice.
        """
        statistics = self._statistics
        # index_add_ would sum in another order from run to run on a GPU, and torch.where would make
        # the GPU wait for its scalar. A masked sum does neither.
        sums = norms.square().expand(slices.foreign.shape).masked_fill(slices.foreign, 0.0)
        sums = sums.sum(dim=1)
        torch.distributed.all_reduce(sums, group=statistics.group)
        damping = (sums / statistics.numel).sqrt_().clamp_(min=1.0)
        return damping[slices.tensor_index].float()

    def _slices_of(self, blocks: list[Block]) -> _Slices:
        """Return the tables for the blocks' slices, from the last step if the shards are the same.

        Building them copies lists to the GPU and waits for it, too slow to do at every step.
        """
        shards = [id(shard) for block in blocks for shard in block.shards]
        if self._slices is None or self._slices.shards != shards:
            statistics = self._statistics
            device = statistics.numel.device
            of_shards = [statistics.tensor_index[shard] for shard in shards]
            tensor_index = torch.tensor(of_shards, device=device)
            counted = [statistics.counted[shard] for shard in shards]
            # [tensors, 1] against [slices]: a table of zeros and ones, [tensors, slices].
            belongs = tensor_index == torch.arange(len(statistics.numel), device=device)[:, None]
            belongs &= torch.tensor(counted, dtype=torch.bool, device=device)
            sizes = [weights.numel() for block in blocks for weights in block.weights]
            elements = torch.tensor(sizes, dtype=torch.int64, device=device)
            self._slices = _Slices(shards, tensor_index.long(), ~belongs, elements)
        return self._slices


def advance_moments(block: Block) -> None:
    """Average a block's gradients into its moments."""
    beta1, beta2 = (_debiased(beta, block.group["step"]) for beta in block.group["betas"])
    seconds = block.moments["exp_avg_sq"]
    torch._foreach_lerp_(block.moments["exp_avg"], block.gradients, 1.0 - beta1)
    torch._foreach_mul_(seconds, beta2)
    torch._foreach_addcmul_(seconds, block.gradients, block.gradients, 1.0 - beta2)


def move_weights(block: Block, *, rate: Factor, keep: Factor) -> None:
    """Set weights to keep * weights - rate * first / (sqrt(second) + eps)."""
    roots = torch._foreach_sqrt(block.moments["exp_avg_sq"])
    torch._foreach_add_(roots, block.group["eps"])
    # With a rate of zero the roots become infinite, and the addcdiv below subtracts zero.
    torch._foreach_div_(roots, rate)
    if block.decay:
        torch._foreach_mul_(block.weights, keep)
    torch._foreach_addcdiv_(block.weights, block.moments["exp_avg"], roots, -1.0)


def _spread(values: torch.Tensor, elements: torch.Tensor, block: Block) -> list[torch.Tensor]:
    """Return each of values [slices] for its slice of the block, which has elements [slices].

    With scalars a GPU would run a kernel for every slice, so it gets each value as often as the
    slice has elements. That would take a CPU as long as the rest of the update.
    """
    if not values.is_cuda:
        return list(values.unbind())
    sizes = [weights.numel() for weights in block.weights]
    # output_size: without it a GPU would be waited for.
    repeated = values.repeat_interleave(elements, output_size=sum(sizes))
    return list(torch.split(repeated, sizes))


def _debiased(beta: float, step: int) -> float:
    """Return the decay that makes a zero-initialised average unbiased at `step`."""
    # beta' = (beta^t - beta) / (beta^t - 1) is 0 at t = 1, so the first gradient is the average,
    # and tends to beta. Averages without bias need no division of moments at every step.
    power = beta**step
    return (power - beta) / (power - 1.0)


def _normalised_gradient_norms(block: Block) -> list[torch.Tensor]:
    """Return the norm of g / max(sqrt(v), eps) of each slice."""
    roots = torch._foreach_sqrt(block.moments["exp_avg_sq"])
    torch._foreach_clamp_min_(roots, block.group["eps"])
    return list(torch._foreach_norm(torch._foreach_div(block.gradients, roots)))
