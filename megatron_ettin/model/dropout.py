"""Dropout of the attention output, from counters: equal under any layout, without state."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_ettin import native


@dataclass(frozen=True)
class OutputDropout:
    """The dropout of the released recipe: after the attention's output projection only.

    Megatron-Core's own `hidden_dropout` would also hit the embedding and the MLP, and is stateful.
    """

    rate: float
    seed: int

    def factors(self, g: torch.Tensor, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return factors like `hidden` [t, 1, hidden] for the rows `g` [m] in `layer` (from 0)."""
        slots, _, channels = hidden.shape
        factors = native.dropout_factors(
            g.cpu().numpy(),
            seq_length=slots // len(g),
            channels=channels,
            seed=self.seed,
            layer=layer,
            rate=self.rate,
        )
        return torch.from_numpy(factors).view_as(hidden).to(hidden)
