"""Plan of a study: its stages, what is done, and the time and disk of the rest."""

from __future__ import annotations

import fnmatch
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.devices import GIB
from megatron_ettin.evaluation.tasks.task import Task
from megatron_ettin.study.arms import Study
from megatron_ettin.study.costs import Cost, Costs
from megatron_ettin.study.machine import num_workers
from megatron_ettin.study.page_stage import PageStage
from megatron_ettin.study.proof import ProofStage
from megatron_ettin.study.stages import (
    EvaluationStage,
    ExportStage,
    SeriesStage,
    Stage,
    TrainingStage,
)
from megatron_ettin.text_table import text_facts, text_table


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """Line of a plan."""

    stage: Stage
    is_done: bool
    refusal: str | None
    estimated: Cost
    """Estimate before any correction; of nothing if the stage is done or refused."""
    seconds: float
    """Time that it took, if it is done; else the estimate times `ratio` of its kind."""


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Lines of all chosen stages, and how their times were found."""

    entries: Sequence[PlannedStage]
    ratios: Mapping[str, float]
    """Time that stages of a kind took over their estimates, by kind."""
    is_measured: bool
    num_workers: int
    """Stages that run side by side, but those that run alone."""

    @property
    def to_do(self) -> dict[str, PlannedStage]:
        """Return the lines of stages that are neither done nor refused, by name."""
        return {
            entry.stage.name: entry
            for entry in self.entries
            if not entry.is_done and entry.refusal is None
        }

    @property
    def seconds(self) -> float:
        """Return the time of what is to do."""
        return sum(
            entry.seconds / (1 if entry.stage.runs_alone else self.num_workers)
            for entry in self.to_do.values()
        )


def all_stages(study: Study, tasks: Mapping[str, Task], config_file: Path) -> list[Stage]:
    """Return all stages of a study in the order in which they run.

    Raises:
        ValueError: `series` names a task that is not there.
    """
    if unknown := [name for name in study.config.series if name not in tasks]:
        raise ValueError(f"series: {study.config.evaluation} has no task {', '.join(unknown)}")
    series = {name: tasks[name] for name in study.config.series}
    models = study.models()
    trained = [model for model in models if model.run is not None]
    # Evaluations go task by task: what compares the arms is complete as early as can be.
    return [
        *(TrainingStage(study=study, model=model) for model in trained if model.start is None),
        *(TrainingStage(study=study, model=model) for model in trained if model.start is not None),
        *([ProofStage(study=study)] if trained else []),
        *(ExportStage(study=study, model=model) for model in trained),
        *(
            EvaluationStage(study=study, model=model, task_name=name, task=task, seed=seed)
            for name, task in tasks.items()
            for model in models
            for seed in task.seeds
        ),
        *(
            SeriesStage(study=study, model=model, tasks=series)
            for model in trained
            if model.is_series and series
        ),
        PageStage(study=study, tasks=tasks, config_file=config_file),
    ]


def choose(stages: Sequence[Stage], patterns: Sequence[str]) -> list[Stage]:
    """Return the stages whose names match one of the patterns of a shell; all without patterns.

    Raises:
        ValueError: a pattern matches no stage.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(stage.name, pattern) for stage in stages):
            raise ValueError(f"--only: no stage matches {pattern!r}; --list prints their names")
    return [
        stage
        for stage in stages
        if not patterns or any(fnmatch.fnmatchcase(stage.name, each) for each in patterns)
    ]


def check_inputs(stages: Sequence[Stage]) -> None:
    """Check all that the stages read and no stage makes, before the first one runs.

    Raises:
        ValueError, OSError: naming the stage or the task, and file, line or field.
    """
    tasks: dict[str, Task] = {}
    for stage in stages:
        try:
            stage.check()
        except (ValueError, OSError) as error:
            raise ValueError(f"{stage.name}: {error}") from error
        tasks |= stage.reads()
    for name, task in tasks.items():
        try:
            task.check()
        except (ValueError, OSError) as error:
            raise ValueError(f"task {name}: {error}") from error


def make_plan(study: Study, stages: Sequence[Stage]) -> StudyPlan:
    """Find out what is done, and estimate the rest; the stages' inputs have been checked."""
    ratios = _ratios(study, stages)
    with tempfile.TemporaryDirectory(prefix="study.") as scratch:
        costs = Costs(study, Path(scratch))
        entries = [_entry(stage, costs, ratios) for stage in stages]
        num_devices = study.config.num_devices
        return StudyPlan(
            entries=entries,
            ratios=ratios,
            is_measured=costs.is_measured,
            # A plan for devices that are elsewhere supposes that one machine has them all.
            num_workers=num_workers(num_devices) if costs.is_measured else num_devices,
        )


def _entry(stage: Stage, costs: Costs, ratios: Mapping[str, float]) -> PlannedStage:
    refusal = stage.refusal()
    is_done = refusal is None and stage.is_done()
    if refusal is not None or is_done:
        recorded = _record(stage)
        seconds = recorded["seconds"] if is_done and recorded is not None else 0.0
        return PlannedStage(
            stage=stage,
            is_done=is_done,
            refusal=refusal,
            estimated=Cost(seconds=0.0),
            seconds=seconds,
        )
    estimated = stage.cost(costs)
    ratio = ratios.get(stage.kind, 1.0)
    return PlannedStage(
        stage=stage,
        is_done=False,
        refusal=None,
        estimated=estimated,
        seconds=ratio * estimated.seconds,
    )


def _record(stage: Stage) -> dict[str, float] | None:
    path = stage.study.stage_file(stage.name)
    try:
        record: dict[str, float] = json.loads(path.read_text())
    except (OSError, ValueError):  # only times are lost
        return None
    return record


def _ratios(study: Study, stages: Sequence[Stage]) -> dict[str, float]:
    taken: dict[str, float] = defaultdict(float)
    estimated: dict[str, float] = defaultdict(float)
    for stage in stages:
        record = _record(stage)
        if record is not None and record["estimated_seconds"] > 0:
            taken[stage.kind] += record["seconds"]
            estimated[stage.kind] += record["estimated_seconds"]
    return {kind: taken[kind] / estimated[kind] for kind in taken}


def as_text(plan: StudyPlan) -> Iterator[str]:
    """Yield the lines of a plan."""
    names = ("stage", "state", "minutes", "GiB")
    rows = [
        (
            entry.stage.name,
            "refused" if entry.refusal else "done" if entry.is_done else "to do",
            f"{entry.seconds / 60:.1f}",
            f"{entry.estimated.num_bytes / GIB:.2f}" if entry.estimated.num_bytes else "",
        )
        for entry in plan.entries
    ]
    yield from text_table(names, rows, numbers=("minutes", "GiB"))
    to_do = plan.to_do.values()
    disk = sum(entry.estimated.num_bytes for entry in to_do) / GIB
    yield ""
    yield from text_facts(
        [
            ("stages", f"{len(plan.entries)}, of which {len(to_do)} are to do"),
            ("time", f"{plan.seconds / 60:.0f} minutes for what is to do{_side_by_side(plan)}"),
            ("disk", f"{disk:.2f} GiB for what is to do"),
            ("times", _source(plan)),
        ]
    )
    for entry in plan.entries:
        if entry.refusal:
            yield f"refused: {entry.stage.name}: {entry.refusal}"


def _side_by_side(plan: StudyPlan) -> str:
    return f", evaluations {plan.num_workers} at a time" if plan.num_workers > 1 else ""


def _source(plan: StudyPlan) -> str:
    timed = "a model with random weights of the same shape was timed on this machine"
    computed = "operations of an fp32 model over the device's peak and the share usually reached"
    training = "operations over the device's peak and the share usually reached"
    source = f"training: {training}; evaluation: {timed if plan.is_measured else computed}"
    if plan.ratios:
        shown = ", ".join(f"{kind} x {ratio:.2f}" for kind, ratio in plan.ratios.items())
        source += f"; corrected by what stages took: {shown}"
    return source
