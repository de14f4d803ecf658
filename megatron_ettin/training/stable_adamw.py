"""StableAdamW over sharded parameters: AdamW whose update is damped by each tensor's RMS.

Source: Wortsman et al. 2023 (arXiv 2304.13013), in the form of ModernBERT's `src/optimizer.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_ettin.training.adamw import AdamW, Block, advance_moments, move


@dataclass(frozen=True, kw_only=True)
class TensorStatistics:
    """How the shards on this rank add up to logical tensors.

    `slot` maps a shard (by id) to its logical tensor; `counted` tells whether this rank's copy
    counts (a tensor replicated over tensor-parallel ranks counts once); `numel` [slots], float64,
    are whole sizes; sums are all-reduced over `group`, the ranks that hold the shards of the same
    tensors.
    """

    slot: dict[int, int]
    counted: dict[int, bool]
    numel: torch.Tensor
    group: torch.distributed.ProcessGroup


class _Slices(NamedTuple):
    """Which logical tensors the slices of a step belong to."""

    shards: list[int]
    """The shard (by id) that each slice is cut from."""
    slots: torch.Tensor
    """[slices] int64, the logical tensor of each."""
    foreign: torch.Tensor
    """[slots, slices] bool, False where a slice counts in a tensor's statistics."""


class StableAdamW(AdamW):
    """AdamW with a per-tensor learning rate of lr / max(1, RMS) and fully decoupled decay.

    RMS = sqrt(mean(g^2 / max(v, eps^2))) over the *whole* logical tensor: fused QKV and GLU as
    one, the tied embedding once. A step shrinks weights by weight_decay * (lr of the tensor) /
    peak lr.
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
        places = [slice(end - len(b.shards), end) for b, end in zip(blocks, ends, strict=True)]
        shards = [shard for block in blocks for shard in block.shards]
        # One tensor: kept norms would lie between the blocks' temporary memory and fragment it.
        norms = self._statistics.numel.new_empty(len(shards))
        for block, place in zip(blocks, places, strict=True):
            advance_moments(block)
            norms[place] = torch.stack(_normalised_gradient_norms(block))
        damping = self._damping(shards, norms)
        for block, place in zip(blocks, places, strict=True):
            rates = block.group["lr"] / damping[place]
            keep = 1.0 - rates * (block.decay / self.peak_lr)
            move(block, rate=list(rates.unbind()), keep=list(keep.unbind()))

    @property
    def _statistics(self) -> TensorStatistics:
        assert self.statistics is not None, "StableAdamW.statistics is not set"
        return self.statistics

    def _damping(self, shards: list[torch.Tensor], norms: torch.Tensor) -> torch.Tensor:
        """Return max(1, RMS) of the logical tensor of each slice, float32.

        `shards` and `norms` [slices], float64, tell for each slice the shard that it is cut from
        and the norm of its g / max(sqrt(v), eps).
        """
        statistics = self._statistics
        slices = self._slices_of([id(shard) for shard in shards])
        # Not index_add_: on a GPU its order of summation differs from run to run. Not where: a GPU
        # waits for its scalar.
        sums = norms.square().expand(slices.foreign.shape).masked_fill(slices.foreign, 0.0)
        sums = sums.sum(dim=1)
        torch.distributed.all_reduce(sums, group=statistics.group)
        return (sums / statistics.numel).sqrt_().clamp_(min=1.0)[slices.slots].float()

    def _slices_of(self, shards: list[int]) -> _Slices:
        """Return the tables for slices of `shards` (by id), which are mostly those of last time.

        They come from lists, so that a GPU waits for them: not at every step, then.
        """
        if self._slices is None or self._slices.shards != shards:
            statistics = self._statistics
            device = statistics.numel.device
            slots = torch.tensor([statistics.slot[shard] for shard in shards], device=device)
            counted = [statistics.counted[shard] for shard in shards]
            belongs = slots == torch.arange(len(statistics.numel), device=device)[:, None]
            belongs &= torch.tensor(counted, dtype=torch.bool, device=device)
            self._slices = _Slices(shards, slots.long(), ~belongs)
        return self._slices


def _normalised_gradient_norms(block: Block) -> list[torch.Tensor]:
    """Return the norm of g / max(sqrt(v), eps) of each slice."""
    roots = torch._foreach_sqrt(block.seconds)
    torch._foreach_clamp_min_(roots, block.group["eps"])
    return list(torch._foreach_norm(torch._foreach_div(block.gradients, roots)))
