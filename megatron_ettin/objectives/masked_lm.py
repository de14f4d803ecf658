"""Masked language modelling, the encoders' objective: predict tokens from both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_ettin.objectives.base import Attention, Batch, MaskingObjective
from megatron_ettin.rows import Rows, TokenIds


@dataclass(frozen=True, kw_only=True)
class MaskedLM(MaskingObjective):
    """BERT's objective at ModernBERT's mask rate; special tokens are never masked."""

    attention: ClassVar[Attention] = "bidirectional"

    mask_rate: float = 0.3
    """Share of the non-special tokens that are predicted: 80 % [MASK], 10 % random, 10 % kept."""

    def make_batch(self, rows: Rows, *, phase: str, mask_seed: int, ids: TokenIds) -> Batch:
        """Mask by counters of (mask_seed, g, position); labels are the original tokens."""
        tokens, selected = self.mask_tokens(rows, phase=phase, mask_seed=mask_seed, ids=ids)
        return Batch(rows=rows, tokens=tokens, labels=rows.tokens, loss_mask=selected)
