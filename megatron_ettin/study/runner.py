"""Running of stages in child processes; a failure stops only what depends on it."""

from __future__ import annotations

import json
import math
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from megatron_ettin.publication import publish_text
from megatron_ettin.study.machine import num_workers
from megatron_ettin.study.stages import Stage
from megatron_ettin.study.workers import Worker, Workers

#: Seconds between two looks at a stage that runs, for the progress bar.
LOOK_SECONDS = 1.0
#: Longest part of a stage's message that is printed.
MESSAGE_CHARACTERS = 2000
#: Bar over the planned seconds; the time that remains follows from the measured rate.
BAR = "{percentage:3.0f}% |{bar:20}| {elapsed}, about {remaining} left, {desc}"


@dataclass
class Failures:
    """Stages that failed, and those that were skipped because of them."""

    failed: dict[str, str] = field(default_factory=dict)
    """Message by stage."""
    skipped: dict[str, str] = field(default_factory=dict)
    """The stage that it lacked, by stage."""

    def as_text(self) -> Iterator[str]:
        """Yield a line for each failed or skipped stage, or one that says that there is none."""
        for name, message in self.failed.items():
            yield f"failed: {name}: {message}"
        for name, lacking in self.skipped.items():
            yield f"skipped: {name}: {lacking} is not done"
        if not self.failed and not self.skipped:
            yield "all stages are done"


@dataclass(frozen=True, kw_only=True)
class Running:
    """A stage that runs."""

    stage: Stage
    worker: Worker
    ends: Future[str | None]
    log: Path
    began: float
    """Seconds since the epoch."""


@dataclass
class Runner:
    """Runs the chosen stages of a study, prints what became of each, and keeps it in `report`."""

    every: Sequence[Stage]
    planned_seconds: Mapping[str, float]
    """Seconds by name of the stages that are to run."""
    estimated_seconds: Mapping[str, float]
    """The same before they were corrected by what earlier stages took; a stage's record has it."""
    num_devices: int = 1
    """Stages that do not run alone run side by side, one a device."""
    report: Failures = field(default_factory=Failures)

    def run(self, stages: Sequence[Stage]) -> None:
        """Run the stages, but those that are done; each begins no earlier than those before it."""
        running: dict[str, Running] = {}
        with Workers(self.num_devices) as workers, ProgressBar(self._shares(stages)) as bar:
            for stage in stages:
                while any(_waits_for(stage, each.stage) for each in running.values()):
                    self._end_some(running, workers, bar)
                if not self._is_to_run(stage):
                    bar.end(stage.name)
                    continue
                while (worker := workers.take(stage)) is None:
                    self._end_some(running, workers, bar)
                running[stage.name] = _start(stage, worker)
            while running:
                self._end_some(running, workers, bar)

    def _shares(self, stages: Sequence[Stage]) -> dict[str, Share]:
        return {
            stage.name: Share(
                planned=self.planned_seconds[stage.name],
                of=1 if stage.runs_alone else num_workers(self.num_devices),
            )
            for stage in stages
            if stage.name in self.planned_seconds
        }

    def _is_to_run(self, stage: Stage) -> bool:
        """Tell whether a stage is to run; say so if it cannot."""
        try:
            if lacking := self._lacking(stage):
                self.report.skipped[stage.name] = lacking
                _print(f"{stage.name}: skipped, because {lacking} is not done")
                return False
            if reason := stage.refusal():
                _print(f"{stage.name}: refused: {reason}")
                return False
            return not stage.is_done()
        except (ValueError, OSError) as error:
            self.report.failed[stage.name] = str(error)
            _print(f"{stage.name}: failed: {error}")
            return False

    def _lacking(self, stage: Stage) -> str | None:
        report, by_name = self.report, {each.name: each for each in self.every}
        for name in stage.needs:
            if name in report.failed or name in report.skipped or not by_name[name].is_done():
                return name
        return None

    def _end_some(self, running: dict[str, Running], workers: Workers, bar: ProgressBar) -> None:
        """Wait a while for running stages, and record and take out those that have ended."""
        wait([each.ends for each in running.values()], LOOK_SECONDS, FIRST_COMPLETED)
        bar.show(running.values())
        for name, each in list(running.items()):
            if each.ends.done():
                self._record(each)
                workers.give_back(each.worker)
                bar.end(name)
                del running[name]

    def _record(self, ended: Running) -> None:
        stage, seconds = ended.stage, time.time() - ended.began
        message = ended.worker.result(ended.ends)
        if message is None and not stage.is_done():
            message = "it ended, but its content is not there"
        if message is not None:
            self.report.failed[stage.name] = message
            shown = message[:MESSAGE_CHARACTERS]
            _print(f"{stage.name}: failed after {seconds:.1f} s: {shown} ({ended.log})")
            return
        document = {
            "stage": stage.name,
            "began": datetime.fromtimestamp(ended.began, UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "estimated_seconds": round(self.estimated_seconds.get(stage.name, 0.0), 3),
            "host": socket.gethostname(),
        }
        publish_text(stage.study.stage_file(stage.name), json.dumps(document, indent=1) + "\n")
        planned = self.planned_seconds.get(stage.name, 0.0)
        _print(f"{stage.name}: {seconds:.1f} s (planned {planned:.1f} s)")


def _waits_for(stage: Stage, other: Stage) -> bool:
    return stage.runs_alone or other.runs_alone or other.name in stage.needs


def _start(stage: Stage, worker: Worker) -> Running:
    log = stage.study.stage_file(stage.name).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    return Running(stage=stage, worker=worker, ends=worker.start(stage, log), log=log, began=began)


def _print(line: str) -> None:
    tqdm.write(line)
    sys.stdout.flush()


@dataclass(frozen=True, kw_only=True)
class Share:
    """Part of the bar that a stage has."""

    planned: float
    """Seconds."""
    of: int
    """Stages that run side by side in this time."""

    def seconds(self, elapsed: float) -> float:
        """Return the seconds of the bar after a stage has run for `elapsed`."""
        return min(elapsed, self.planned) / self.of


class ProgressBar:
    """Bar over the planned time of all stages together, for a `with` block."""

    def __init__(self, shares: Mapping[str, Share]) -> None:
        """Take the shares of the stages that are to run, by name."""
        self._shares = shares
        self._ended = 0.0
        total = sum(share.seconds(share.planned) for share in shares.values())
        self._bar: tqdm[NoReturn] = tqdm(total=total, disable=None, bar_format=BAR)

    def __enter__(self) -> ProgressBar:
        """Return the bar."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar."""
        self._bar.close()

    def show(self, running: Iterable[Running]) -> None:
        """Move the bar to what the stages have done that have ended and those that run."""
        now = time.time()
        names = {each.stage.name: now - each.began for each in running}
        self._bar.set_description(", ".join(names), refresh=False)
        self._move(self._ended + sum(self._done(*each) for each in names.items()))

    def end(self, name: str) -> None:
        """Count a stage's share as done."""
        self._ended += self._done(name, math.inf)
        self._move(max(self._ended, self._bar.n))

    def _done(self, name: str, elapsed: float) -> float:
        return self._shares[name].seconds(elapsed) if name in self._shares else 0.0

    def _move(self, to: float) -> None:
        self._bar.update(to - self._bar.n)
        self._bar.refresh()
