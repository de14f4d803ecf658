"""Mixtures: each row has one of several objectives, and all of them train one set of weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ettin import native
from megatron_ettin.objectives.base import Batch, Objective, RowShare
from megatron_ettin.rows import Rows, TokenIds


@dataclass(frozen=True, kw_only=True)
class Mixture(Objective):
    """Several objectives by row, such as GPT-BERT's two (arXiv 2410.24159).

    The objective of row g is drawn by a counter of (mask_seed, g). So shares hold for any rows, and
    a row keeps its objective in every batch, layout and run. The loss is the mean over the tokens
    of all rows of a step: an objective that scores more tokens of a row weighs more.
    """

    objectives: list[Objective]
    """The objectives; a model is exported as the first one's kind unless another is asked for."""
    shares: list[float]
    """Share of the rows that each objective gets; they need not add up to 1."""

    def __post_init__(self) -> None:
        """Refuse shares that are no shares, and mixtures within a mixture."""
        if len(self.objectives) < 2 or len(self.objectives) != len(self.shares):
            raise ValueError(
                f"objective.shares: {len(self.shares)} shares for {len(self.objectives)} "
                f"objectives; a mixture has two objectives or more, each with a share"
            )
        if not all(0.0 < share < float("inf") for share in self.shares):
            raise ValueError(f"objective.shares: {self.shares}: each must be above 0, and finite")
        for objective in self.objectives:
            if not hasattr(objective, "attention"):
                raise ValueError(
                    f"objective.objectives: {type(objective).__name__} consists of others; a "
                    f"mixture takes plain ones (ByPhase may hold a Mixture)"
                )

    def row_shares(self) -> tuple[RowShare, ...]:
        """Return the objectives with their shares, which add up to 1."""
        total = sum(self.shares)
        pairs = zip(self.objectives, self.shares, strict=True)
        return tuple(RowShare(objective, share / total) for objective, share in pairs)

    def choose(self, g: NDArray[np.int64], mask_seed: int) -> NDArray[np.int64]:
        """Return the number of each row's objective [m] (docs/order.md, section 7)."""
        sums = np.cumsum(self.shares)
        bounds = sums[:-1] / sums[-1]
        draws = [
            native.counter_draws(native.counter_key(mask_seed, native.Purpose.MIXTURE, [row]), 0, 1)
            for row in np.maximum(g, 0).tolist()
        ]
        places = (np.concatenate(draws) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.searchsorted(bounds, places, side="right")

    def make_batch(self, rows: Rows, *, phase: str, mask_seed: int, ids: TokenIds) -> Batch:
        """Return a batch in which each row is that of its own objective."""
        choice = self.choose(rows.g, mask_seed)
        joined = _Joined(rows)
        for index, objective in enumerate(self.objectives):
            # The rows of other objectives are idle for this one, which saves it their draws.
            own = dataclasses.replace(rows, g=np.where(choice == index, rows.g, -1))
            batch = objective.make_batch(own, phase=phase, mask_seed=mask_seed, ids=ids)
            joined.take(batch, choice == index, is_causal=objective.attention == "causal")
        return joined.batch()

    def scored_share(self, phase: str) -> float:
        """Return the mean of the objectives' shares over the rows."""
        return sum(part.share * part.objective.scored_share(phase) for part in self.row_shares())

    def largest_scored_share(self, phase: str) -> float:
        """Return that of the objective that scores most."""
        return max(objective.largest_scored_share(phase) for objective in self.objectives)


class _Joined:
    """Batch whose rows come from several others over the same rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        slots = len(rows.tokens)
        self.tokens = rows.tokens.copy()
        self.labels = rows.tokens.copy()
        self.loss_mask = np.zeros(slots, dtype=np.bool_)
        self.weights = np.ones(slots, dtype=np.float32)
        self.counted = np.zeros(slots, dtype=np.bool_)
        self.is_causal = np.zeros(len(rows.g), dtype=np.bool_)
        self.prediction_distance = np.zeros(len(rows.g), dtype=np.int64)

    def take(self, batch: Batch, chosen: NDArray[np.bool_], *, is_causal: bool) -> None:
        """Take the rows `chosen` [m] from a batch."""
        slots = np.repeat(chosen, self.rows.seq_length)
        self.tokens[slots] = batch.tokens[slots]
        self.labels[slots] = batch.labels[slots]
        self.loss_mask[slots] = batch.loss_mask[slots]
        self.counted[slots] = batch.averaged[slots]
        if batch.weights is not None:
            self.weights[slots] = batch.weights[slots]
        self.is_causal[chosen] = is_causal
        distance = np.broadcast_to(batch.prediction_distance, len(chosen))
        self.prediction_distance[chosen] = distance[chosen]

    def batch(self) -> Batch:
        """Return the batch, without weights and counted tokens where they say nothing."""
        is_scored, weights = self.loss_mask, self.weights
        return Batch(
            rows=self.rows,
            tokens=self.tokens,
            labels=self.labels,
            loss_mask=self.loss_mask,
            weights=None if (weights[is_scored] == 1.0).all() else weights,
            counted=None if np.array_equal(self.counted, is_scored) else self.counted,
            is_causal=self.is_causal,
            prediction_distance=self.prediction_distance,
        )
