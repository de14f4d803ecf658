"""Running of stages in order, each in a child process; a failure stops only what depends on it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from tqdm import tqdm

from megatron_ettin.ending import end_with_parent
from megatron_ettin.publication import publish_text
from megatron_ettin.study.stages import Stage

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


@dataclass
class Runner:
    """Runs the chosen stages of a study, prints what became of each, and keeps it in `report`."""

    every: Sequence[Stage]
    planned_seconds: Mapping[str, float]
    """Seconds by name of the stages that are to run."""
    estimated_seconds: Mapping[str, float]
    """The same before they were corrected by what earlier stages took; a stage's record has it."""
    report: Failures = field(default_factory=Failures)

    def run(self, stages: Sequence[Stage]) -> None:
        """Run the stages in order, but those that are done."""
        names = {stage.name for stage in stages}
        planned = {n: s for n, s in self.planned_seconds.items() if n in names}
        with (
            Worker() as worker,
            tqdm(total=sum(planned.values()), disable=None, bar_format=BAR) as bar,
        ):
            for stage in stages:
                bar.set_description(stage.name)
                progress = Progress(bar=bar, planned=planned.get(stage.name, 0.0), begin=bar.n)
                if line := self._run_one(stage, worker, progress):
                    tqdm.write(line)
                    sys.stdout.flush()
                progress.end()

    def _run_one(self, stage: Stage, worker: Worker, progress: Progress) -> str | None:
        """Run a stage and return the line to print of it; None if it was done already."""
        try:
            if lacking := self._lacking(stage):
                self.report.skipped[stage.name] = lacking
                return f"{stage.name}: skipped, because {lacking} is not done"
            if reason := stage.refusal():
                return f"{stage.name}: refused: {reason}"
            if stage.is_done():
                return None
        except (ValueError, OSError) as error:
            self.report.failed[stage.name] = str(error)
            return f"{stage.name}: failed: {error}"
        record = stage.study.stage_file(stage.name)
        record.parent.mkdir(parents=True, exist_ok=True)
        log = record.with_suffix(".log")
        began = time.time()
        message = worker.run(stage, log, progress)
        seconds = time.time() - began
        if message is None and not stage.is_done():
            message = "it ended, but its content is not there"
        if message is not None:
            self.report.failed[stage.name] = message
            shown = message[:MESSAGE_CHARACTERS]
            return f"{stage.name}: failed after {seconds:.1f} s: {shown} ({log})"
        document = {
            "stage": stage.name,
            "began": datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "estimated_seconds": round(self.estimated_seconds.get(stage.name, 0.0), 3),
            "host": socket.gethostname(),
        }
        publish_text(record, json.dumps(document, indent=1) + "\n")
        return f"{stage.name}: {seconds:.1f} s (planned {progress.planned:.1f} s)"

    def _lacking(self, stage: Stage) -> str | None:
        report, by_name = self.report, {each.name: each for each in self.every}
        for name in stage.needs:
            if name in report.failed or name in report.skipped or not by_name[name].is_done():
                return name
        return None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Part of the bar that a stage has."""

    bar: tqdm[NoReturn]
    planned: float
    begin: float
    began: float = field(default_factory=time.monotonic)

    def show(self) -> None:
        """Move the bar to the seconds that the stage has run, at most to the planned ones."""
        elapsed = time.monotonic() - self.began
        self._move(self.begin + min(elapsed, self.planned))

    def end(self) -> None:
        """Move the bar to the end of the stage's part."""
        self._move(self.begin + self.planned)

    def _move(self, to: float) -> None:
        self.bar.update(to - self.bar.n)
        self.bar.refresh()


class Worker:
    """A child process that runs stages one after another; a new one follows one that was killed.

    Evaluations so import their libraries once, and a stage that the kernel kills for its memory
    does not take the study along. The child ends with this process, however that ends.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._pid = 0

    def __enter__(self) -> Worker:
        """Start nothing yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the child; after an error it may still work, and is killed."""
        if self._pool is not None:
            if kind is not None:
                with suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
            self._pool.shutdown(cancel_futures=True)

    def run(self, stage: Stage, log: Path, progress: Progress) -> str | None:
        """Run a stage with its output appended to `log`; return the message of its failure."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                max_workers=1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=end_with_parent,
                initargs=(os.getpid(),),
            )
            self._pid = self._pool.submit(os.getpid).result()
        running = self._pool.submit(run_logged, stage, log)
        try:
            while not wait([running], timeout=LOOK_SECONDS).done:
                progress.show()
            return running.result()
        except BrokenProcessPool:
            self._pool.shutdown()
            self._pool = None
            return (
                "its process was killed, as the kernel does when memory runs out: lower batch "
                "sizes, or run it on a machine with more memory"
            )


def run_logged(stage: Stage, log: Path) -> str | None:
    """Run a stage in this process with all output appended to a file; return why it failed."""
    import torch

    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    try:
        stage.run()
    except torch.OutOfMemoryError:
        return "out of GPU memory: lower batch sizes"
    except MemoryError:
        return "out of memory: lower batch sizes"
    except Exception as error:
        traceback.print_exc()
        # Errors of these classes name the input and the remedy; others are faults of a program.
        is_message = isinstance(error, ValueError | OSError) and str(error)
        return str(error) if is_message else f"{type(error).__name__}: {error}"
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return None
