"""Base of every optimizer here: updates in blocks, which keep temporary memory small.

A new optimizer is a subclass with two things: `moments`, the tensors that it keeps beside each
weight, and `update`, one step over `blocks()`. Sharding, precision and checkpoints are those of
`training/optimizer.py`, for any `moments` (docs/extending.md).

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from megatron_ettin import cpu

#: Elements of a block. On a CPU a block fits the cache; a GPU wants few, long kernels.
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}

#: Names that a moment can have: Megatron-Core 0.16.1 gathers tensors of these names, and no other,
#: from the ranks that share an optimizer's state.
Moment = Literal["exp_avg", "exp_avg_sq"]


@dataclass(frozen=True)
class Block:
    """Flat slices of the shards of one parameter group, with their gradients and moments."""

    group: dict[str, Any]
    shards: list[torch.Tensor]
    """Shard that contains each slice."""
    weights: list[torch.Tensor]
    gradients: list[torch.Tensor]
    moments: dict[Moment, list[torch.Tensor]]
    """Slices of each moment that the optimizer keeps."""

    @property
    def decay(self) -> float:
        """Weight decay of the group."""
        decay: float = self.group["weight_decay"] * self.group["wd_mult"]
        return decay


class BlockOptimizer(torch.optim.AdamW):
    """Moments and blocks of the shards on a rank; a subclass says which, and takes the step.

    Two things differ from torch's optimizers: `step` lives in the parameter groups, and a group's
    `wd_mult` multiplies its decay. The class derives from torch's AdamW only because
    Megatron-Core's DistributedOptimizer accepts no other; nothing of torch's update runs.
    """

    moments: ClassVar[tuple[Moment, ...]]
    """Tensors that are kept beside each weight, in its shape and in float32, zeros at first."""

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
        """Take over a state unchanged; Adam's own method expects a `step` beside the moments."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every shard that has a gradient."""
        self.initialize_state()
        for group in self.param_groups:
            group["step"] += 1
        with cpu.without_modes():
            self.update()

    @abstractmethod
    def update(self) -> None:
        """Update moments and weights; the groups hold the number of this step already."""

    def initialize_state(self) -> None:
        """Create zero moments for all shards that have none; a checkpoint loads into them."""
        for group in self.param_groups:
            for shard in group["params"]:
                state = self.state[shard]
                if not state:
                    state.update({name: torch.zeros_like(shard) for name in self.moments})

    def blocks(self) -> Iterator[Block]:
        """Yield the shards that have a gradient, cut into slices, block by block."""
        for group in self.param_groups:
            slices: list[tuple[torch.Tensor, ...]] = []
            room = 0
            for shard in group["params"]:
                if shard.grad is None or not shard.numel():
                    continue
                size, state = BLOCK_ELEMENTS[shard.device.type], self.state[shard]
                whole = (shard.detach(), shard.grad, *(state[name] for name in self.moments))
                for parts in zip(*(tensor.view(-1).split(size) for tensor in whole), strict=True):
                    if slices and parts[0].numel() > room:
                        yield self._block(group, slices)
                        slices = []
                    room = (room if slices else size) - parts[0].numel()
                    slices.append((shard, *parts))
            if slices:
                yield self._block(group, slices)

    def _block(self, group: dict[str, Any], slices: list[tuple[torch.Tensor, ...]]) -> Block:
        shards, weights, gradients, *moments = map(list, zip(*slices, strict=True))
        named = dict(zip(self.moments, moments, strict=True))
        return Block(group, shards, weights, gradients, named)
