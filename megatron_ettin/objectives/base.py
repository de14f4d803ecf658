"""The contract between the sample order, the objectives and the model: rows in, a scored batch out.

Everything here is numpy and a pure function of (seed, g); no file is read and no state is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_ettin import native
from megatron_ettin.rows import Rows, TokenIds

Attention = Literal["bidirectional", "causal"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Input of a model: one micro-batch as a packed stream of t = m * seq_length slots."""

    rows: Rows
    tokens: NDArray[np.int64]
    """[t] input ids, masked where the objective masks."""
    labels: NDArray[np.int64]
    """[t] the token predicted *from hidden state p*; read only where `loss_mask` is set."""
    loss_mask: NDArray[np.bool_]
    """[t] the scored positions."""
    weights: NDArray[np.float32] | None = None
    """[t] factor of the loss, read where `loss_mask` is set; None: 1 everywhere."""
    counted: NDArray[np.bool_] | None = None
    """[t] the tokens over which the summed loss is averaged; None: the scored positions."""
    is_causal: bool | NDArray[np.bool_] | None = None
    """True if positions see only those before them, for all rows or [m] for each. None: the rows
    attend as the run's model does."""
    prediction_distance: int | NDArray[np.int64] = 0
    """Slots from a scored position forward to the token that it predicts, or [m] of each row."""

    @property
    def averaged(self) -> NDArray[np.bool_]:
        """Positions [t] over which the summed loss is averaged."""
        return self.loss_mask if self.counted is None else self.counted


class RowShare(NamedTuple):
    """Objective of some rows."""

    objective: Objective
    """An objective that has an attention of its own."""
    share: float
    """Share of the rows, on average."""


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Rule for predictions (`make_batch`) and for attention between positions (`attention`).

    A subclass is both the `objective` section of a run's YAML and its behaviour. Objectives that
    consist of others have no attention of their own: ask `attentions`.
    """

    attention: ClassVar[Attention]
    prediction_shift: ClassVar[int] = 0
    """Distance from a [MASK] back to the position that predicts it, in a model that fills masks."""
    measures_text: ClassVar[bool] = False
    """True if the loss is -log p(text), or a bound of it from above, in nats per token."""

    @abstractmethod
    def make_batch(self, rows: Rows, *, phase: str, mask_seed: int, ids: TokenIds) -> Batch:
        """Return inputs, labels and scored positions: a function of (rows, mask_seed) only."""

    def original_tokens(self, batch: Batch) -> NDArray[np.int64]:
        """Rebuild the unmasked tokens [t] from the batch that was consumed (for the digest)."""
        tokens = batch.tokens.copy()
        scored = np.flatnonzero(batch.loss_mask)
        distances = np.broadcast_to(batch.prediction_distance, len(batch.rows.g))
        tokens[scored + distances[scored // batch.rows.seq_length]] = batch.labels[scored]
        return tokens

    def for_phase(self, phase: str) -> Objective:
        """Return the objective of the rows of `phase`, which other phases may not share."""
        return self

    def row_shares(self) -> tuple[RowShare, ...]:
        """Return the objectives that the rows of a phase get, in the order of the configuration."""
        return (RowShare(self, 1.0),)

    def choose(self, g: NDArray[np.int64], mask_seed: int) -> NDArray[np.int64]:
        """Return which of the objectives of `row_shares` each of the rows g [m] gets."""
        return np.zeros(len(g), dtype=np.int64)

    def scored_share(self, phase: str) -> float:
        """Return a bound from above of the share of slots that are scored in `phase`, on average.

        A single row may have more.
        """
        return 1.0

    def largest_scored_share(self, phase: str) -> float:
        """Return that share of the rows that have most scored positions."""
        return self.scored_share(phase)


@dataclass(frozen=True, kw_only=True)
class MaskingObjective(Objective):
    """Mask rates, and masks that depend on (mask_seed, g, position in the row) alone."""

    mask_rate: float
    """Share of the non-special tokens that are predicted: 80 % [MASK], 10 % random, 10 % kept."""
    mask_rate_by_phase: dict[str, float] = field(default_factory=dict)
    """Mask rates that replace mask_rate, by phase name."""

    def __post_init__(self) -> None:
        """Refuse rates outside (0, 1)."""
        for name, rate in {"mask_rate": self.mask_rate, **self.mask_rate_by_phase}.items():
            if not 0.0 < rate < 1.0:
                raise ValueError(f"objective.{name}: {rate} is not a share between 0 and 1")

    def mask_tokens(
        self, rows: Rows, *, phase: str, mask_seed: int, ids: TokenIds
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return (inputs with replacements [t], selection [t]); selected tokens are predicted."""
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
        """Return the phase's mask rate; it is a bound because special tokens are never masked."""
        return self.mask_rate_by_phase.get(phase, self.mask_rate)


def attentions(objective: Objective, phases: Iterable[str]) -> tuple[Attention, ...]:
    """Return the directions in which rows of these phases attend, each once, in order."""
    shares = [share for phase in phases for share in objective.for_phase(phase).row_shares()]
    return tuple(dict.fromkeys(share.objective.attention for share in shares))


def all_measure_text(objective: Objective) -> bool:
    """Tell whether the loss of every row of a phase is -log p(text), or a bound of it."""
    return all(share.objective.measures_text for share in objective.row_shares())


def next_tokens(rows: Rows, last: int) -> NDArray[np.int64]:
    """Return [t] the token after each slot of the stream; `last` after the last one.

    Segments play no part here: the loss mask says which of these labels count.
    """
    return np.append(rows.tokens[1:], last)
