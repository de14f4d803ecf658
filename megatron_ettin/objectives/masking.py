"""Choosing and replacing tokens: what the objectives that predict masked tokens share."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_ettin import native
from megatron_ettin.objectives.base import Objective
from megatron_ettin.rows import Rows, TokenIds


@dataclass(frozen=True, kw_only=True)
class MaskingObjective(Objective):
    """Rates of masking, and the masks: functions of (mask_seed, g, position in the row) alone."""

    mask_rate: float
    """Share of the non-special tokens that are predicted: 80 % [MASK], 10 % random, 10 % kept."""
    mask_rate_by_phase: dict[str, float] = field(default_factory=dict)
    """Rates of the phases that differ, by phase name."""

    def __post_init__(self) -> None:
        """Refuse rates outside (0, 1)."""
        for name, rate in {"mask_rate": self.mask_rate, **self.mask_rate_by_phase}.items():
            if not 0.0 < rate < 1.0:
                raise ValueError(f"objective.{name}: {rate} is not a share between 0 and 1")

    def mask(
        self, rows: Rows, *, phase: str, mask_seed: int, ids: TokenIds
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the inputs [t] with replacements, and which of them were selected [t]."""
        return native.mask_tokens(
            rows.tokens,
            rows.g,
            seq_length=rows.seq_length,
            mask_seed=mask_seed,
            mask_rate=self.scored_share(phase),
            mask_id=ids.mask,
            vocab_size=ids.vocab_size,
            special_ids=ids.special,
        )

    def scored_share(self, phase: str) -> float:
        """Return the phase's mask rate: special tokens and padding are never masked."""
        return self.mask_rate_by_phase.get(phase, self.mask_rate)
