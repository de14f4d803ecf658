"""Masked next-token prediction: how a decoder learns to read both ways (decoder to encoder)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron_ettin.objectives.base import Attention, Batch, MaskingObjective, next_tokens
from megatron_ettin.rows import Rows, TokenIds


@dataclass(frozen=True, kw_only=True)
class MaskedNextToken(MaskingObjective):
    """Prediction of masked tokens, each from the position before it, as a decoder predicts.

    This is MNTP of LLM2Vec (arXiv 2404.05961, section 2.2) at the mask rate of Ettin's
    cross-objective runs. The first token of a segment has no predecessor and is never masked, so
    every masked token is predicted.
    """

    attention: ClassVar[Attention] = "bidirectional"
    prediction_shift: ClassVar[int] = 1

    mask_rate: float = 0.15
    """Share of the non-special tokens that are predicted: 80 % [MASK], 10 % random, 10 % kept."""

    def make_batch(self, rows: Rows, *, phase: str, mask_seed: int, ids: TokenIds) -> Batch:
        """Mask by counters of (mask_seed, g, position); labels[p] is the original of slot p + 1."""
        tokens, selected = self.mask_tokens(rows, phase=phase, mask_seed=mask_seed, ids=ids)
        firsts = rows.cu_seqlens[:-1][np.diff(rows.cu_seqlens) > 0]
        tokens[firsts] = rows.tokens[firsts]
        selected[firsts] = False
        # The token masked at slot p is predicted at p - 1. Slot 0 begins a segment, so no selected
        # token falls off the front.
        loss_mask = np.append(selected[1:], False)
        return Batch(
            rows=rows,
            tokens=tokens,
            labels=next_tokens(rows, ids.pad),
            loss_mask=loss_mask,
            prediction_distance=1,
        )
