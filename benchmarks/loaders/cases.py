"""Cases of a resumed run: the settings before and after a stop, drawn by (seed, axis, number)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

Axis = Literal["nothing", "ranks", "batch", "horizon", "nothing, blended", "blend", "all at once"]
AXES: tuple[Axis, ...] = get_args(Axis)
BLENDED: tuple[Axis, ...] = ("nothing, blended", "blend", "all at once")

#: Every batch divides every corpus and every number of ranks divides every batch, so that no
#: epoch ends inside a batch unless a change puts it there.
RANKS = (1, 2, 4)
BATCHES = (4, 8, 12)
SIZES = (24, 48)
MAX_WEIGHT = 5


@dataclass(frozen=True, kw_only=True)
class RunSetting:
    """Settings of a run that a restart may change."""

    ranks: int
    batch: int
    """Samples of a step over all ranks."""
    weights: tuple[int, ...]
    """Share of each source."""
    horizon: int
    """Samples of the whole run."""


@dataclass(frozen=True, kw_only=True)
class ResumeCase:
    """A run that stops after `stop_steps` steps and goes on with other settings."""

    sizes: tuple[int, ...]
    """Documents of each source."""
    before: RunSetting
    after: RunSetting
    stop_steps: int
    seed: int
    """Seed of the loader's order."""

    @property
    def consumed(self) -> int:
        """Samples of the steps before the stop."""
        return self.stop_steps * self.before.batch


def draw_case(axis: Axis, number: int, *, seed: int = 0) -> ResumeCase:
    """Return a case of an axis."""
    rng = np.random.default_rng([seed, AXES.index(axis), number])
    num_sources = int(rng.integers(2, 4)) if axis in BLENDED else 1
    sizes = tuple(int(n) for n in rng.choice(SIZES, num_sources))
    before = RunSetting(
        ranks=int(rng.choice(RANKS)),
        batch=int(rng.choice(BATCHES)),
        weights=_weights(rng, num_sources),
        horizon=_horizon(rng, sum(sizes)),
    )
    changed = replace(
        before,
        ranks=_another(rng, before.ranks, RANKS),
        batch=_another(rng, before.batch, BATCHES),
        weights=_other_weights(rng, before.weights),
        horizon=_other_horizon(rng, before.horizon, sum(sizes)),
    )
    after = _after(axis, before, changed)
    # A step is left on both sides, in the old horizon and in the new one.
    last_step = (min(before.horizon, after.horizon) - 1) // before.batch
    return ResumeCase(
        sizes=sizes,
        before=before,
        after=after,
        stop_steps=int(rng.integers(1, last_step + 1)),
        seed=int(rng.integers(1, 10_000)),
    )


def _after(axis: Axis, before: RunSetting, changed: RunSetting) -> RunSetting:
    match axis:
        case "nothing" | "nothing, blended":
            return before
        case "ranks":
            return replace(before, ranks=changed.ranks)
        case "batch":
            return replace(before, batch=changed.batch)
        case "horizon":
            return replace(before, horizon=changed.horizon)
        case "blend":
            return replace(before, weights=changed.weights)
        case "all at once":
            return changed


def _another(rng: np.random.Generator, value: int, values: tuple[int, ...]) -> int:
    return int(rng.choice([each for each in values if each != value]))


def _weights(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    return tuple(int(weight) for weight in rng.integers(1, MAX_WEIGHT + 1, count))


def _other_weights(rng: np.random.Generator, weights: tuple[int, ...]) -> tuple[int, ...]:
    """Return weights that are another blend, of the same sources; the same for one source."""
    other = weights
    while len(weights) > 1 and _shares(other) == _shares(weights):
        other = _weights(rng, len(weights))
    return other


def _shares(weights: tuple[int, ...]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def _horizon(rng: np.random.Generator, documents: int) -> int:
    """Return 1 to 2.5 epochs; in half of the cases, exactly one or two."""
    if rng.random() < 0.5:
        return documents * int(rng.integers(1, 3))
    return int(rng.integers(documents, documents * 5 // 2 + 1))


def _other_horizon(rng: np.random.Generator, horizon: int, documents: int) -> int:
    other = horizon
    while other == horizon:
        other = _horizon(rng, documents)
    return other
