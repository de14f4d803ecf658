"""Measurement of models in tasks: skipped where its result is on disk, named where it fails."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_ettin.evaluation.model import Model, quiet_transformers
from megatron_ettin.evaluation.results import Result, ResultStore, result_key
from megatron_ettin.evaluation.tasks.task import Task
from megatron_ettin.versions import installed_version

#: Packages whose versions a result holds; those that are missing are left out.
PACKAGES = ("torch", "transformers", "sentence-transformers", "lm-eval", "mteb", "scikit-learn")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A measurement: one model, one task, one seed."""

    model: Model
    task_name: str
    task: Task
    seed: int

    def __str__(self) -> str:
        """Name it in messages."""
        return f"{self.model.name}, {self.task_name}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of a unit: a result, or the reason that there is none."""

    unit: Unit
    result: Result | None = None
    was_on_disk: bool = False
    refusal: str | None = None
    """Reason that the task does not suit the model; no fault."""
    failure: str | None = None
    """Message of the error that ended the measurement."""

    def __str__(self) -> str:
        """Say it in one line."""
        if self.result is None:
            what = f"FAILED: {self.failure}" if self.failure else f"left out: {self.refusal}"
            return f"{self.unit}: {what}"
        place = "on disk" if self.was_on_disk else f"{self.result.seconds:.0f} s"
        name, score = next(iter(self.result.scores.items()))
        return f"{self.unit}: {name} {score.value:.4f} ({place})"


def units(models: Sequence[Model], tasks: Mapping[str, Task]) -> list[Unit]:
    """Return all measurements, task by task: models of one task follow each other."""
    return [
        Unit(model=model, task_name=name, task=task, seed=seed)
        for name, task in tasks.items()
        for model in models
        for seed in task.seeds
    ]


def measure_all(chosen: Sequence[Unit], store: ResultStore) -> Iterator[Outcome]:
    """Yield the outcome of each unit; a failure does not keep the others from being measured."""
    for unit in chosen:
        if reason := unit.task.refusal(unit.model):
            yield Outcome(unit=unit, refusal=reason)
            continue
        try:
            yield measure(unit, store)
        except torch.OutOfMemoryError:
            yield Outcome(unit=unit, failure="out of GPU memory: lower batch sizes")
        except MemoryError:
            yield Outcome(unit=unit, failure="out of memory: lower batch sizes")
        except (ValueError, OSError, RuntimeError) as error:
            yield Outcome(unit=unit, failure=str(error))


def measure(unit: Unit, store: ResultStore) -> Outcome:
    """Read a unit's result, or measure it and publish the result."""
    key = result_key(unit.model, unit.task, unit.seed)
    place = (unit.model.name, unit.task_name, unit.seed)
    if result := store.read(*place, key):
        return Outcome(unit=unit, result=result, was_on_disk=True)
    scratch = store.scratch(*place, key)
    scratch.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with quiet_transformers():
        measurement = unit.task.measure(unit.model, seed=unit.seed, scratch=scratch)
    result = Result(
        model=unit.model.name,
        task=unit.task_name,
        seed=unit.seed,
        key=key,
        settings=unit.task.settings(),
        scores=measurement.scores,
        notes=measurement.notes,
        seconds=time.monotonic() - begin,
        versions={name: found for name in PACKAGES if (found := installed_version(name))},
    )
    store.write(result)
    shutil.rmtree(scratch)
    return Outcome(unit=unit, result=result)
