"""StableAdamW over sharded parameters: AdamW whose update is damped by each tensor's RMS.

Source: Wortsman et al. 2023 (arXiv 2304.13013), in the form of ModernBERT's `src/optimizer.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class TensorStatistics:
    """How the shards on this rank add up to logical tensors.

    `slot` maps a shard (by id) to its logical tensor; `counted` tells whether this rank's copy
    counts (a tensor replicated over tensor-parallel ranks counts once); `numel` [slots] are whole
    sizes; sums are all-reduced over `group`, the ranks that hold the shards of the same tensors.
    """

    slot: dict[int, int]
    counted: dict[int, bool]
    numel: torch.Tensor
    group: torch.distributed.ProcessGroup


class StableAdamW(torch.optim.AdamW):
    """AdamW with a per-tensor learning rate of lr / max(1, RMS) and fully decoupled decay.

    RMS = sqrt(mean(g^2 / max(v, eps^2))) over the *whole* logical tensor: fused QKV and GLU as
    one, the tied embedding once. A step shrinks weights by weight_decay * (lr of the tensor) /
    peak lr. State per shard: `exp_avg`, `exp_avg_sq`; `step` lives in the parameter groups.

    It subclasses torch's AdamW because Megatron-Core's DistributedOptimizer accepts Adam only (it
    knows the two moments by name); `step` replaces AdamW's.
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

        Groups may set `wd_mult`. `statistics` must be set before the first step.
        """
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.peak_lr = lr
        self.statistics: TensorStatistics | None = None
        for group in self.param_groups:
            group["step"] = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state as it is: Adam's own would look for a `step` beside the moments."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every shard that has a gradient."""
        statistics = self.statistics
        assert statistics is not None, "StableAdamW.statistics is not set"
        updates = [self._moments(group) for group in self.param_groups]
        sums = torch.zeros_like(statistics.numel)
        for group, (shards, gradients, _, seconds) in zip(self.param_groups, updates, strict=True):
            for shard, gradient, second in zip(shards, gradients, seconds, strict=True):
                if statistics.counted[id(shard)]:
                    floor = second.clamp(min=group["eps"] ** 2)
                    sums[statistics.slot[id(shard)]] += gradient.square().div_(floor).sum()
        torch.distributed.all_reduce(sums, group=statistics.group)
        damping = (sums / statistics.numel).sqrt_().clamp_(min=1.0)
        for group, update in zip(self.param_groups, updates, strict=True):
            self._apply(group, update, damping[[statistics.slot[id(p)] for p in update[0]]])

    def initialize_state(self) -> None:
        """Create zero moments for all shards, as a step would (a checkpoint load needs them)."""
        for group in self.param_groups:
            for shard in group["params"]:
                state = self.state[shard]
                if not state:
                    state["exp_avg"] = torch.zeros_like(shard)
                    state["exp_avg_sq"] = torch.zeros_like(shard)

    def _moments(self, group: dict[str, Any]) -> tuple[list[torch.Tensor], ...]:
        """Advance the moments of a group; return shards, gradients, first and second moments."""
        self.initialize_state()
        group["step"] += 1
        shards = [shard for shard in group["params"] if shard.grad is not None and shard.numel()]
        gradients = [shard.grad for shard in shards]
        firsts = [self.state[shard]["exp_avg"] for shard in shards]
        seconds = [self.state[shard]["exp_avg_sq"] for shard in shards]
        if shards:
            beta1, beta2 = (_debiased(beta, group["step"]) for beta in group["betas"])
            torch._foreach_lerp_(firsts, gradients, 1.0 - beta1)
            torch._foreach_mul_(seconds, beta2)
            torch._foreach_addcmul_(seconds, gradients, gradients, 1.0 - beta2)
        return shards, gradients, firsts, seconds

    def _apply(
        self,
        group: dict[str, Any],
        update: tuple[list[torch.Tensor], ...],
        damping: torch.Tensor,
    ) -> None:
        shards, _, firsts, seconds = update
        if not shards:
            return
        rates = (group["lr"] / damping).unbind()
        decay = group["weight_decay"] * group["wd_mult"]
        if decay:
            torch._foreach_mul_(shards, [1.0 - rate * (decay / self.peak_lr) for rate in rates])
        denominators = torch._foreach_sqrt(seconds)
        torch._foreach_add_(denominators, group["eps"])
        steps = torch._foreach_div(firsts, denominators)
        torch._foreach_mul_(steps, list(rates))
        torch._foreach_sub_(shards, steps)


def _debiased(beta: float, step: int) -> float:
    """Return the decay that makes a zero-initialised average unbiased at `step`."""
    power = beta**step
    return (power - beta) / (power - 1.0)
