"""The contract between the sample order, the objectives and the model: rows in, a scored batch out.

Everything here is numpy and a pure function of (seed, g); no file is read and no state is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_ettin import native
from megatron_ettin.rows import Rows, TokenIds


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch as a packed stream of t = m * seq_length slots: what a model consumes."""

    rows: Rows
    tokens: NDArray[np.int64]
    """[t] input ids, masked where the objective masks."""
    labels: NDArray[np.int64]
    """[t] the token predicted *from hidden state p*; read only where `loss_mask` is set."""
    loss_mask: NDArray[np.bool_]
    """[t] the scored positions."""


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """What is predicted (`make_batch`) and how positions attend to each other (`attention`).

    A subclass is at once the `objective` section of a run's YAML and the behaviour.
    """

    attention: ClassVar[Literal["bidirectional", "causal"]]
    prediction_shift: ClassVar[int] = 0
    """How many positions before a [MASK] its prediction is read, in a model that fills masks."""

    @abstractmethod
    def make_batch(self, rows: Rows, *, phase: str, mask_seed: int, ids: TokenIds) -> Batch:
        """Return inputs, labels and scored positions: a function of (rows, mask_seed) only."""

    @abstractmethod
    def original_tokens(self, batch: Batch) -> NDArray[np.int64]:
        """Rebuild the unmasked tokens [t] from the batch that was consumed (for the digest)."""

    def scored_share(self, phase: str) -> float:
        """Return the share of a row's slots that are scored in `phase`, at most."""
        return 1.0


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


def next_tokens(rows: Rows, last: int) -> NDArray[np.int64]:
    """Return [t] the token after each slot of the stream; `last` after the last one.

    Segments are not looked at: which of these are predicted is for a loss mask to say.
    """
    return np.append(rows.tokens[1:], last)
