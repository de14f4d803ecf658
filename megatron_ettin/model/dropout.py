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

    def apply(
        self,
        hidden: torch.Tensor,
        g: torch.Tensor,
        seq_length: int,
        layer: int,
        first_slot: int = 0,
    ) -> torch.Tensor:
        """Interim."""
        whole = hidden.new_empty(len(g) * seq_length, 1, hidden.shape[-1])
        return hidden * self.factors(g, layer, whole)[first_slot : first_slot + len(hidden)]

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
