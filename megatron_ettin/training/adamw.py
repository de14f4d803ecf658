"""AdamW and StableAdamW over the shards of a rank, in blocks that keep temporary memory small.

AdamW: Loshchilov and Hutter 2019 (arXiv 1711.05101), with the semantics of torch.optim.AdamW.
StableAdamW: Wortsman et al. 2023 (arXiv 2304.13013), in the form of ModernBERT's
`src/optimizer.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_ettin import cpu

#: Elements that are updated together. On a CPU they fit its cache; a GPU wants few, long kernels.
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}

#: A factor for all slices of a block, or one scalar tensor for each.
Factor = float | list[torch.Tensor]


@dataclass(frozen=True)
class Block:
    """Flat slices of the shards of one parameter group, and what belongs to each slice."""

    group: dict[str, Any]
    shards: list[torch.Tensor]
    """The shard that a slice is cut from."""
    weights: list[torch.Tensor]
    gradients: list[torch.Tensor]
    firsts: list[torch.Tensor]
    """First moments."""
    seconds: list[torch.Tensor]
    """Second moments."""

    @property
    def decay(self) -> float:
        """Weight decay of the group."""
        decay: float = self.group["weight_decay"] * self.group["wd_mult"]
        return decay


class AdamW(torch.optim.AdamW):
    """torch's AdamW: a step shrinks weights by lr * weight_decay, then moves them by the moments.

    State per shard: `exp_avg`, `exp_avg_sq`. Unlike torch's, `step` lives in the parameter groups,
    and the moments are averages without bias (torch divides biased ones at every step). Groups have
    a `wd_mult` that multiplies the decay. It is a subclass because Megatron-Core's
    DistributedOptimizer accepts no other class (it knows the two moments by name).
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
        """Build the optimizer of parameter groups, each with its `wd_mult`."""
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for group in self.param_groups:
            group["step"] = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state as it is: Adam's own would look for a `step` beside the moments."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every shard that has a gradient."""
        self.initialize_state()
        for group in self.param_groups:
            group["step"] += 1
        with cpu.without_modes():
            self.update()

    def update(self) -> None:
        """Update moments and weights; the groups have the number of this step."""
        for block in self.blocks():
            lr = block.group["lr"]
            advance_moments(block)
            move_weights(block, rate=lr, keep=1.0 - lr * block.decay)

    def initialize_state(self) -> None:
        """Create zero moments for all shards, as a step would (a checkpoint load needs them)."""
        for group in self.param_groups:
            for shard in group["params"]:
                state = self.state[shard]
                if not state:
                    state["exp_avg"] = torch.zeros_like(shard)
                    state["exp_avg_sq"] = torch.zeros_like(shard)

    def blocks(self) -> Iterator[Block]:
        """Yield the shards that have a gradient, cut into slices, block by block."""
        for group in self.param_groups:
            slices: list[tuple[torch.Tensor, ...]] = []
            room = 0
            for shard in group["params"]:
                if shard.grad is None or not shard.numel():
                    continue
                size, state = BLOCK_ELEMENTS[shard.device.type], self.state[shard]
                whole = (shard.detach(), shard.grad, state["exp_avg"], state["exp_avg_sq"])
                for parts in zip(*(tensor.view(-1).split(size) for tensor in whole), strict=True):
                    if slices and parts[0].numel() > room:
                        yield Block(group, *map(list, zip(*slices, strict=True)))
                        slices = []
                    room = (room if slices else size) - parts[0].numel()
                    slices.append((shard, *parts))
            if slices:
                yield Block(group, *map(list, zip(*slices, strict=True)))


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
            move_weights(block, rate=list(rates.unbind()), keep=list(keep.unbind()))

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


def advance_moments(block: Block) -> None:
    """Average a block's gradients into its moments."""
    beta1, beta2 = (_debiased(beta, block.group["step"]) for beta in block.group["betas"])
    torch._foreach_lerp_(block.firsts, block.gradients, 1.0 - beta1)
    torch._foreach_mul_(block.seconds, beta2)
    torch._foreach_addcmul_(block.seconds, block.gradients, block.gradients, 1.0 - beta2)


def move_weights(block: Block, *, rate: Factor, keep: Factor) -> None:
    """Set weights to keep * weights - rate * first / (sqrt(second) + eps)."""
    roots = torch._foreach_sqrt(block.seconds)
    torch._foreach_add_(roots, block.group["eps"])
    # A rate of zero makes them infinite, and what is subtracted below zero.
    torch._foreach_div_(roots, rate)
    if block.decay:
        torch._foreach_mul_(block.weights, keep)
    torch._foreach_addcdiv_(block.weights, block.firsts, roots, -1.0)


def _debiased(beta: float, step: int) -> float:
    """Return the decay that makes a zero-initialised average unbiased at `step`."""
    power = beta**step
    return (power - beta) / (power - 1.0)


def _normalised_gradient_norms(block: Block) -> list[torch.Tensor]:
    """Return the norm of g / max(sqrt(v), eps) of each slice."""
    roots = torch._foreach_sqrt(block.seconds)
    torch._foreach_clamp_min_(roots, block.group["eps"])
    return list(torch._foreach_norm(torch._foreach_div(block.gradients, roots)))
