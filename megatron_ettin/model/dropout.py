"""Dropout of the attention output, drawn from counters: equal under any layout, without state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_ettin import native

LANE_RANGE = 65_536
"""A channel is dropped by 16 bits of a draw."""


class Draws(NamedTuple):
    """Parameters of the draws of one layer; with g and a place in the row they give the factors."""

    key: int
    """u64 key of (dropout seed, layer), before g is absorbed."""
    threshold: int
    """Bound of the 16 bits of a channel, below which it is dropped."""
    kept: float
    """Factor of the channels that stay: 1 / (1 - the share that is dropped)."""


@dataclass(frozen=True)
class OutputDropout:
    """Dropout after the attention's output projection only, as in the released recipe.

    Megatron-Core's `hidden_dropout` also drops outputs of the embedding and the MLP, and its random
    state depends on history.
    """

    rate: float
    seed: int


@dataclass(frozen=True)
class LayerDropout:
    """Dropout of the output of one layer's attention, for consecutive slots of a stream."""

    dropout: OutputDropout
    layer: int
    """Number of the layer, from 0."""
    g: torch.Tensor
    """[m] int64 rows of the stream, of `seq_length` slots each; an idle row (g < 0) stays as is."""
    seq_length: int
    first_slot: int
    """First of the slots: 0, or that of a rank's share."""

    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        """Drop channels of `hidden` [n, 1, H] on a CPU; the product is rounded once, to its dtype.

        On a GPU, `add_norm_triton.py` draws the same factors where it adds the residual.
        """
        slots, _, channels = hidden.shape
        factors = native.dropout_factors(
            self.g.numpy(),
            seq_length=self.seq_length,
            channels=channels,
            seed=self.dropout.seed,
            layer=self.layer,
            rate=self.dropout.rate,
            first_slot=self.first_slot,
            num_slots=slots,
        )
        return (hidden * torch.from_numpy(factors).view_as(hidden)).to(hidden.dtype)

    def draws(self) -> Draws:
        """Return what the kernel for GPUs needs to know of a layer (docs/order.md, section 7)."""
        threshold = min(math.ceil(self.dropout.rate * LANE_RANGE), LANE_RANGE - 1)
        return Draws(
            key=native.counter_key(self.dropout.seed, native.Purpose.DROPOUT, [self.layer]),
            threshold=threshold,
            kept=LANE_RANGE / (LANE_RANGE - threshold),
        )
