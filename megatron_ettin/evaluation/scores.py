"""Scores with their uncertainty: every number of an evaluation, and every difference of two."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, spearmanr
from scipy.stats import t as students_t
from sklearn.metrics import f1_score, matthews_corrcoef

Values = NDArray[np.float64]
CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
RESAMPLING_SEED = 20
#: Numbers that a batch of resamples may hold: 64 MB of float64.
BATCH_NUMBERS = 8_000_000


def _spearman(predictions: Values, references: Values) -> float:
    return float(spearmanr(predictions, references).statistic)


#: Metrics that are no mean over items, as functions of predictions [n] and references [n].
CORPUS_METRICS: Mapping[str, Callable[[Values, Values], float]] = {
    "F1": f1_score,
    "Matthews correlation": matthews_corrcoef,
    "Spearman correlation": _spearman,
}


class ConfidenceInterval(NamedTuple):
    """Bounds of a confidence interval of 95 %."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Tell whether zero lies outside."""
        return self.low > 0.0 or self.high < 0.0


class ScoreDifference(NamedTuple):
    """Difference of two scores on the same items."""

    value: float
    interval: ConfidenceInterval


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric on the items of a test set, for one seed or more of the same measurement.

    A metric of CORPUS_METRICS is computed from `predictions` and `references`; any other metric is
    the mean of `predictions`, which then hold each item's own value (1 for a right answer).
    """

    metric: str
    items: tuple[str, ...]
    """Identities of the n items; scores are compared on equal items only."""
    predictions: Values
    """Shape [seeds, n]."""
    references: Values | None = None
    """Shape [n]; None where the metric is a mean of the predictions."""
    groups: tuple[str, ...] | None = None
    """Group of each item, such as its data set, where the value is the mean over groups of their
    means. Items are then resampled within their groups."""
    chance: float | None = None
    """Value that a guess reaches, where that is known."""

    def __post_init__(self) -> None:
        if self.predictions.ndim != 2 or self.predictions.shape[1] != len(self.items):
            raise ValueError(
                f"{self.metric}: predictions of shape {self.predictions.shape} for "
                f"{len(self.items)} items"
            )
        if not self.items:
            raise ValueError(f"{self.metric}: no items were scored")
        if (self.metric in CORPUS_METRICS) != (self.references is not None):
            raise ValueError(f"{self.metric}: references belong to {', '.join(CORPUS_METRICS)}")
        if self.groups and (self.references is not None or len(self.groups) != len(self.items)):
            raise ValueError(f"{self.metric}: groups belong to means, one to each item")

    @property
    def seed_values(self) -> Values:
        """Return the metric of each seed."""
        return np.array([self._metric(row, self.references) for row in self.predictions])

    @property
    def value(self) -> float:
        """Mean of the metric over seeds."""
        return float(self.seed_values.mean())

    @functools.cached_property
    def _resampled(self) -> Any:
        return bootstrap_over_items(self._strata, self._on)

    @property
    def standard_error(self) -> float:
        """Standard error over items, by bootstrap."""
        return float(self._resampled.standard_error)

    @property
    def interval(self) -> ConfidenceInterval:
        """Interval over items, by percentile bootstrap."""
        return ConfidenceInterval(*map(float, self._resampled.confidence_interval))

    @property
    def seed_interval(self) -> ConfidenceInterval | None:
        """Interval of the mean over seeds (Student's t); None for a single seed."""
        return interval_over_seeds(self.seed_values)

    def minus(self, other: Score) -> ScoreDifference:
        """Return the difference to another score, with its interval by paired bootstrap over items.

        Raises:
            ValueError: the two are of different metrics or items.
        """
        mine, theirs = ((s.metric, s.items, s.groups) for s in (self, other))
        if mine != theirs:
            raise ValueError(f"{self.metric} and {other.metric}: not of the same items")
        # Both were resampled with the same seed: resample k took the same items from either.
        differences = (
            self._resampled.bootstrap_distribution - other._resampled.bootstrap_distribution
        )
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(differences, (tail, 1 - tail))
        return ScoreDifference(
            self.value - other.value, ConfidenceInterval(float(low), float(high))
        )

    @property
    def _strata(self) -> list[NDArray[np.int64]]:
        """Return the indices of the items of each group."""
        if self.groups is None:
            return [np.arange(len(self.items))]
        groups = np.array(self.groups)
        return [np.flatnonzero(groups == name) for name in dict.fromkeys(self.groups)]

    @functools.cached_property
    def _weights(self) -> Values:
        """Return the weight [n] of each item in a mean; all are 1 where there are no groups."""
        weights = np.zeros(len(self.items))
        strata = self._strata
        for members in strata:
            weights[members] = len(self.items) / len(strata) / len(members)
        return weights

    def _metric(self, predictions: Values, references: Values | None) -> float:
        if references is None:
            return float((predictions * self._weights).mean())
        return float(CORPUS_METRICS[self.metric](predictions, references))

    def _on(self, chosen: NDArray[np.int64]) -> Values:
        """Return the value on items `chosen` [resamples, n]."""
        if self.references is None:
            return (self.predictions.mean(axis=0) * self._weights)[chosen].mean(axis=-1)
        return np.array(
            [
                np.mean([self._metric(row[one], self.references[one]) for row in self.predictions])
                for one in chosen
            ]
        )


def bootstrap_over_items(
    strata: Sequence[NDArray[np.int64]], statistic: Callable[[NDArray[np.int64]], Values]
) -> Any:
    """Return scipy's bootstrap result of a statistic of item indices [resamples, n].

    Each of the strata, arrays of item indices, is resampled on its own.
    """

    def on_resamples(*chosen: NDArray[np.int64], axis: int) -> Values:
        together = np.concatenate(chosen, axis=-1)
        return statistic(np.atleast_2d(together)).reshape(together.shape[:-1])

    return bootstrap(
        tuple(strata),
        on_resamples,
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, BATCH_NUMBERS // sum(map(len, strata))),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(RESAMPLING_SEED),
    )


def interval_over_seeds(values: Values) -> ConfidenceInterval | None:
    """Return the interval of a mean of seeds' values (Student's t); None for fewer than two."""
    if len(values) < 2:
        return None
    quantile = students_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    half = float(quantile * values.std(ddof=1) / math.sqrt(len(values)))
    return ConfidenceInterval(float(values.mean()) - half, float(values.mean()) + half)


def over_seeds(scores: Sequence[Score]) -> Score:
    """Join scores of the same items that differ in their seeds alone.

    Raises:
        ValueError: they are of different metrics or items.
    """
    first = scores[0]
    if any((score.metric, score.items) != (first.metric, first.items) for score in scores):
        raise ValueError(f"{first.metric}: the seeds were not measured on the same items")
    return Score(
        metric=first.metric,
        items=first.items,
        predictions=np.concatenate([score.predictions for score in scores]),
        references=first.references,
        groups=first.groups,
        chance=first.chance,
    )
