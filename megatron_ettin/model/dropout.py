"""Dropout of the attention output, drawn from counters: equal under any layout, without state.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_ettin import native

LANE_RANGE = 65_536
"""A channel is dropped by 16 bits of a draw."""


class LayerDraws(NamedTuple):
    """Parameters of one layer's dropout; with g and a place in the stream they give the factors."""

    key: int
    """u64 key of (dropout seed, layer), before g is absorbed."""
    threshold: int
    """Bound of the 16 bits of a channel, below which it is dropped."""
    kept: float
    """Factor of the channels that stay: 1 / (1 - the share that is dropped)."""
    seq_length: int
    first_slot: int


@dataclass(frozen=True)
class OutputDropout:
    """Dropout after the attention's output projection only, as in the released recipe.

    Megatron-Core's `hidden_dropout` also drops outputs of the embedding and the MLP, and its random
    state depends on history.
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
        """Drop channels of `hidden` [n, 1, H], the output of the attention of `layer` (from 0).

        The rows g [m] int64 form a stream of m * seq_length slots. `hidden` holds n of these slots
        from first_slot on: all of them, or a rank's share. An idle row (g < 0) stays as it is. The
        product is rounded once, to the dtype of `hidden`.
        """
        slots, _, channels = hidden.shape
        if hidden.is_cuda:
            from megatron_ettin.model.dropout_triton import drop

            return drop(hidden, g, self.layer_draws(seq_length, layer, first_slot))
        factors = native.dropout_factors(
            g.numpy(),
            seq_length=seq_length,
            channels=channels,
            seed=self.seed,
            layer=layer,
            rate=self.rate,
            first_slot=first_slot,
            num_slots=slots,
        )
        return (hidden * torch.from_numpy(factors).view_as(hidden)).to(hidden.dtype)

    def layer_draws(self, seq_length: int, layer: int, first_slot: int = 0) -> LayerDraws:
        """Return what the kernel for GPUs needs to know of a layer (docs/order.md, section 7)."""
        threshold = min(math.ceil(self.rate * LANE_RANGE), LANE_RANGE - 1)
        return LayerDraws(
            key=native.counter_key(self.seed, native.Purpose.DROPOUT, [layer]),
            threshold=threshold,
            kept=LANE_RANGE / (LANE_RANGE - threshold),
            seq_length=seq_length,
            first_slot=first_slot,
        )
