"""Masked language modelling: predict a share of the tokens from both sides (the encoders)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_ettin import native
from megatron_ettin.objectives.base import Batch, Objective, Rows, TokenIds


@dataclass(frozen=True, kw_only=True)
class MaskedLM(Objective):
    """BERT's objective at ModernBERT's rate; special tokens are never masked."""

    attention: ClassVar[Literal["bidirectional", "causal"]] = "bidirectional"

    mask_rate: float = 0.3
    """Share of the non-special tokens that are predicted: 80 % [MASK], 10 % random, 10 % kept."""
    mask_rate_by_phase: dict[str, float] = field(default_factory=lambda: {"decay": 0.15})
    """Rates of the phases that differ, by phase name."""

    def __post_init__(self) -> None:
        """Refuse rates outside (0, 1)."""
        for name, rate in {"mask_rate": self.mask_rate, **self.mask_rate_by_phase}.items():
            if not 0.0 < rate < 1.0:
                raise ValueError(f"objective.{name}: {rate} is not a share between 0 and 1")

    def make_batch(self, rows: Rows, *, phase: str, mask_seed: int, ids: TokenIds) -> Batch:
        """Mask by counters of (mask_seed, g, position); labels are the original tokens."""
        tokens, selected = native.mask_tokens(
            rows.tokens,
            rows.g,
            seq_length=rows.seq_length,
            mask_seed=mask_seed,
            mask_rate=self.mask_rate_by_phase.get(phase, self.mask_rate),
            mask_id=ids.mask,
            vocab_size=ids.vocab_size,
            special_ids=ids.special,
        )
        return Batch(rows=rows, tokens=tokens, labels=rows.tokens, loss_mask=selected)

    def original_tokens(self, batch: Batch) -> NDArray[np.int64]:
        """Put the labels back where the input was masked."""
        return np.where(batch.loss_mask, batch.labels, batch.tokens)
