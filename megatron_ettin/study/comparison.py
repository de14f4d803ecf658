"""All numbers of a study, and the differences of its arms on the same items."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

import numpy as np

from megatron_ettin.evaluation.results import Result, ResultStore, read_result
from megatron_ettin.evaluation.scores import (
    ConfidenceInterval,
    Score,
    Values,
    interval_over_seeds,
    over_seeds,
)
from megatron_ettin.evaluation.tasks.task import Family, Task
from megatron_ettin.study.arms import StudyModel

FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Score of a task at one size: what numbers of arms are compared in."""

    size: str
    family: Family
    task: str
    score: str
    is_first: bool = field(compare=False)
    """True if the score stands for its task in figures."""


@dataclass(frozen=True, kw_only=True)
class Number:
    """A quantity of one arm, over all its seeds."""

    quantity: Quantity
    arm: str
    score: Score
    seeds: tuple[tuple[int | None, int], ...]
    """Training seed (None if published) and evaluation seed of each row of the score."""

    @property
    def seed_kind(self) -> str:
        """Kind of the seeds that the between-seed interval is over: training or evaluation."""
        return "training" if len({training for training, _ in self.seeds}) > 1 else "evaluation"

    @property
    def by_seed(self) -> dict[int | None, float]:
        """Return the value of each such seed; that of a training seed is a mean of evaluations."""
        position = 0 if self.seed_kind == "training" else 1
        values: dict[int | None, list[float]] = {}
        for seeds, value in zip(self.seeds, self.score.seed_values, strict=True):
            values.setdefault(seeds[position], []).append(float(value))
        return {seed: float(np.mean(found)) for seed, found in values.items()}

    @property
    def seed_interval(self) -> ConfidenceInterval | None:
        """Interval of the mean over these seeds (Student's t); None for a single one."""
        return interval_over_seeds(np.array(list(self.by_seed.values())))

    @property
    def is_at_chance(self) -> bool:
        """True if the interval over items holds the value of a guess."""
        low, high = self.score.interval
        return self.score.chance is not None and low <= self.score.chance <= high


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Difference of two arms in a quantity: the first one's value minus the other's."""

    quantity: Quantity
    first: str
    second: str
    value: float
    interval: ConfidenceInterval
    """Interval over items, by paired bootstrap."""
    seed_interval: ConfidenceInterval | None
    """Interval over seeds that both arms have, paired by seed; None for fewer than two."""

    @property
    def is_beyond(self) -> bool:
        """True if no interval of the difference holds zero."""
        return self.interval.excludes_zero and (
            self.seed_interval is None or self.seed_interval.excludes_zero
        )


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A number that the study asks for and that is not shown, and why."""

    model: str
    task: str
    seed: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class StudyComparison:
    """The numbers of all arms, tasks and sizes, family by family."""

    arms: tuple[str, ...]
    sizes: tuple[str, ...]
    numbers: tuple[Number, ...]
    missing: tuple[Missing, ...]
    results: tuple[Result, ...]
    """Results that the numbers come from: settings, notes, versions, seconds."""

    @cached_property
    def by_quantity(self) -> dict[Quantity, dict[str, Number]]:
        """Return the numbers of the arms that have one, by quantity."""
        numbers: dict[Quantity, dict[str, Number]] = {}
        for number in self.numbers:
            numbers.setdefault(number.quantity, {})[number.arm] = number
        return numbers

    @cached_property
    def contrasts(self) -> tuple[Contrast, ...]:
        """Return the differences of all pairs of arms, in the order of the arms.

        Raises:
            ValueError: two arms were measured on other items.
        """
        return tuple(
            _contrast(first, second)
            for numbers in self.by_quantity.values()
            for first, second in itertools.combinations(numbers.values(), 2)
        )

    @cached_property
    def highest(self) -> frozenset[tuple[Quantity, str]]:
        """Return the numbers that are above those of all other arms, each beyond its intervals."""
        above: dict[tuple[Quantity, str], int] = {}
        for contrast in self.contrasts:
            if contrast.is_beyond:
                arm = contrast.first if contrast.value > 0 else contrast.second
                above[contrast.quantity, arm] = above.get((contrast.quantity, arm), 0) + 1
        others = {quantity: len(numbers) - 1 for quantity, numbers in self.by_quantity.items()}
        return frozenset(key for key, count in above.items() if count == others[key[0]])

    def figure_quantities(self, family: Family, size: str) -> list[Quantity]:
        """Return the quantities of a family that stand for its tasks, at one size."""
        return [
            quantity
            for quantity in self.by_quantity
            if quantity.is_first and (quantity.family, quantity.size) == (family, size)
        ]

    @property
    def families(self) -> list[Family]:
        """Return the families that have numbers."""
        there = {quantity.family for quantity in self.by_quantity}
        return [family for family in FAMILIES if family in there]


def compare_arms(
    models: Sequence[StudyModel], tasks: Mapping[str, Task], store: ResultStore
) -> StudyComparison:
    """Read the results of all models in all tasks.

    Raises:
        ValueError: a file is no result, or the seeds of an arm were measured on other items.
    """
    missing: list[Missing] = []
    results: list[Result] = []
    numbers: list[Number] = []
    for (size, arm, task_name), group in _groups(models, tasks):
        found = {}
        for model in group:
            for seed in tasks[task_name].seeds:
                result = _read(store, model.name, task_name, seed, tasks[task_name])
                if isinstance(result, Missing):
                    missing.append(result)
                else:
                    found[model.seed, seed] = result
        results += found.values()
        numbers += _numbers(size, arm, tasks[task_name].family, found)
    order = {family: index for index, family in enumerate(FAMILIES)}
    return StudyComparison(
        arms=tuple(dict.fromkeys(model.arm for model in models)),
        sizes=tuple(dict.fromkeys(model.size for model in models)),
        numbers=tuple(sorted(numbers, key=lambda number: order[number.quantity.family])),
        missing=tuple(missing),
        results=tuple(results),
    )


def _groups(
    models: Sequence[StudyModel], tasks: Mapping[str, Task]
) -> Iterator[tuple[tuple[str, str, str], list[StudyModel]]]:
    """Yield the models that differ in their training seed alone, for each size, task and arm."""
    seeds: dict[tuple[str, str], list[StudyModel]] = {}
    for model in models:
        seeds.setdefault((model.size, model.arm), []).append(model)
    for task_name in tasks:
        for (size, arm), group in seeds.items():
            yield (size, arm, task_name), group


def _read(
    store: ResultStore, model: str, task_name: str, seed: int, task: Task
) -> Result | Missing:
    path = store.path(model, task_name, seed)
    if not path.is_file():
        return Missing(model=model, task=task_name, seed=seed, reason="no result")
    result = read_result(path)
    settings = json.loads(json.dumps(task.settings(), default=str))
    if result.settings != settings:
        changed = sorted(
            name
            for name in {*settings, *result.settings}
            if settings.get(name) != result.settings.get(name)
        )
        reason = f"measured with another {', '.join(changed)}; run the study again"
        return Missing(model=model, task=task_name, seed=seed, reason=reason)
    return result


def _numbers(
    size: str, arm: str, family: Family, found: Mapping[tuple[int | None, int], Result]
) -> Iterator[Number]:
    """Yield the numbers of one arm in one task, joined over `found` by seeds."""
    if not found:
        return
    first = next(iter(found.values()))
    for position, name in enumerate(first.scores):
        seeds = tuple(key for key, result in found.items() if name in result.scores)
        try:
            score = over_seeds([found[key].scores[name] for key in seeds])
        except ValueError as error:
            raise ValueError(f"{size}, {arm}, {first.task}, {name}: {error}") from error
        quantity = Quantity(
            size=size, family=family, task=first.task, score=name, is_first=position == 0
        )
        yield Number(quantity=quantity, arm=arm, score=score, seeds=seeds)


def _contrast(first: Number, second: Number) -> Contrast:
    try:
        difference = first.score.minus(second.score)
    except ValueError as error:
        place = f"{first.quantity.size}, {first.quantity.task}, {first.quantity.score}"
        raise ValueError(f"{place}: {first.arm} and {second.arm}: {error}") from error
    return Contrast(
        quantity=first.quantity,
        first=first.arm,
        second=second.arm,
        value=difference.value,
        interval=difference.interval,
        seed_interval=interval_over_seeds(_differences_by_seed(first, second)),
    )


def _differences_by_seed(first: Number, second: Number) -> Values:
    """Return the differences at the seeds of both arms; none if they are of two kinds."""
    if first.seed_kind != second.seed_kind:
        return np.array([])
    one, other = first.by_seed, second.by_seed
    return np.array([one[seed] - other[seed] for seed in one if seed in other])


def versions_of(results: Iterable[Result]) -> dict[str, list[str]]:
    """Return the versions of each package that the results were measured with."""
    found: dict[str, set[str]] = {}
    for result in results:
        for name, version in result.versions.items():
            found.setdefault(name, set()).add(version)
    return {name: sorted(versions) for name, versions in sorted(found.items())}


def notes_of(result: Result) -> list[tuple[str, Any]]:
    """Return the notes of a result that fit on a line: a chosen learning rate, a count."""
    return [
        (name, value)
        for name, value in result.notes.items()
        if isinstance(value, str | int | float) and len(str(value)) <= 80
    ]
