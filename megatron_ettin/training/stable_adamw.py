"""StableAdamW over sharded parameters: AdamW whose update is damped by each tensor's RMS.

Source: Wortsman et al. 2023 (arXiv 2304.13013), in the form of ModernBERT's `src/optimizer.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every shard that has a gradient; the ranks of `statistics.group` call this."""
        self.initialize_state()
        for group in self.param_groups:
            group["step"] += 1
        blocks = list(self.blocks())
        norms = []
        for block in blocks:
            advance_moments(block)
            norms += _normalised_gradient_norms(block)
        damping = self._damping([shard for block in blocks for shard in block.shards], norms)
        begin = 0
        for block in blocks:
            end = begin + len(block.shards)
            rates = block.group["lr"] / damping[begin:end]
            keep = 1.0 - rates * (block.decay / self.peak_lr)
            move(block, rate=list(rates.unbind()), keep=list(keep.unbind()))
            begin = end

    def _damping(self, shards: list[torch.Tensor], norms: list[torch.Tensor]) -> torch.Tensor:
        """Return max(1, RMS) of the logical tensor of each slice, float32.

        `shards` and `norms` tell for each slice the shard that it is cut from and the norm of its
        g / max(sqrt(v), eps).
        """
        statistics = self.statistics
        assert statistics is not None, "StableAdamW.statistics is not set"
        device = statistics.numel.device
        slots = torch.tensor([statistics.slot[id(shard)] for shard in shards], device=device).long()
        counted = [statistics.counted[id(shard)] for shard in shards]
        squares = torch.stack(norms).double().square_() if norms else slots.double()
        # Not index_add_: on a GPU its order of summation differs from run to run.
        belongs = slots == torch.arange(len(statistics.numel), device=device)[:, None]
        belongs &= torch.tensor(counted, dtype=torch.bool, device=device)
        sums = torch.where(belongs, squares, 0.0).sum(dim=1)
        torch.distributed.all_reduce(sums, group=statistics.group)
        return (sums / statistics.numel).sqrt_().clamp_(min=1.0)[slots].float()


def _normalised_gradient_norms(block: Block) -> list[torch.Tensor]:
    """Return the norm of g / max(sqrt(v), eps) of each slice."""
    roots = torch._foreach_sqrt(block.seconds)
    torch._foreach_clamp_min_(roots, block.group["eps"])
    return list(torch._foreach_norm(torch._foreach_div(block.gradients, roots)))
