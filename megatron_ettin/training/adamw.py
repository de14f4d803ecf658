"""AdamW over the shards of a rank, block by block, so that temporary memory stays small.

Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), with the semantics of torch.optim.AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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
            move(block, rate=lr, keep=1.0 - lr * block.decay)

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


def advance_moments(block: Block) -> None:
    """Average a block's gradients into its moments."""
    beta1, beta2 = (_debiased(beta, block.group["step"]) for beta in block.group["betas"])
    torch._foreach_lerp_(block.firsts, block.gradients, 1.0 - beta1)
    torch._foreach_mul_(block.seconds, beta2)
    torch._foreach_addcmul_(block.seconds, block.gradients, block.gradients, 1.0 - beta2)


def move(block: Block, *, rate: Factor, keep: Factor) -> None:
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
