"""A process that takes stages, one after the other: `python -m tests.gpu.worker FOLDER MODULE...`.

It imports the modules, which takes long, before its first stage. It reads one JSON object a line,
the name and the command of a stage, and answers each with one line when the stage has ended. What
the stage prints goes to FOLDER/log.txt. What it measures goes to FOLDER/results.jsonl at once: each
outcome of a test, and each line of JSON that a benchmark prints.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import pytest

Record = Callable[[dict[str, Any]], None]


class Outcomes:
    """A plugin of pytest that records each test as it ends."""

    def __init__(self, record: Record) -> None:
        """Start without tests."""
        self._record = record
        self.counts: dict[str, int] = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the call of a test, and a set-up or an end that did not pass."""
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        found = {"test": report.nodeid, "outcome": report.outcome, **dict(report.user_properties)}
        self._record({**found, "seconds": round(report.duration, 2)})


class Printed:
    """Standard output whose lines of JSON are recorded as soon as they are complete."""

    def __init__(self, to: TextIO, record: Record) -> None:
        """Pass everything on to `to`."""
        self._to, self._record, self._line = to, record, ""

    def write(self, text: str) -> int:
        """Print text."""
        self._to.write(text)
        *whole, self._line = (self._line + text).split("\n")
        for line in whole:
            self._record_json(line)
        return len(text)

    def flush(self) -> None:
        """Pass on what is buffered."""
        self._to.flush()

    def __getattr__(self, name: str) -> Any:
        """Return whatever else is asked of standard output."""
        return getattr(self._to, name)

    def _record_json(self, line: str) -> None:
        try:
            found = json.loads(line)
        except ValueError:
            return
        if isinstance(found, dict):
            self._record(found)


def run_stage(command: Sequence[str], record: Record) -> dict[str, Any]:
    """Run arguments of Python in this process; return its exit code, and counts of tests."""
    if tuple(command[:2]) == ("-m", "pytest"):
        outcomes = Outcomes(record)
        code = pytest.main(list(command[2:]), plugins=[outcomes])
        return {"exit_code": int(code), **outcomes.counts}
    with redirect_stdout(Printed(sys.stdout, record)):  # type: ignore[type-var]
        return {"exit_code": run_program(command)}


def run_program(command: Sequence[str]) -> int:
    """Run `-m MODULE ARGUMENTS` or `FILE ARGUMENTS` as a program; return its exit code."""
    is_module = command[0] == "-m"
    program, *arguments = command[1:] if is_module else command
    before = sys.argv
    sys.argv = [program, *arguments]
    try:
        if is_module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.argv = before
    return 0


def free_gpu() -> None:
    """Give back the memory that this process holds for nothing: the other one may need it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def main() -> None:
    """Take stages until there are no more."""
    folder, *modules = Path(sys.argv[1]), *sys.argv[2:]
    # An interrupt ends the stage; a shell's background jobs ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # pytest and the programs may do as they like with the standard files.
    commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for standard in (1, 2):
        os.dup2(log, standard)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    for module in modules:
        importlib.import_module(module)
    print(json.dumps({"ready": modules}), file=answers)
    with (folder / "results.jsonl").open("a", buffering=1) as results:
        for line in commands:
            stage = json.loads(line)

            def record(found: dict[str, Any], name: str = stage["name"]) -> None:
                results.write(json.dumps({"stage": name, **found}) + "\n")

            ended = run_stage(stage["command"], record)
            sys.stdout.flush()
            free_gpu()
            print(json.dumps(ended), file=answers)


if __name__ == "__main__":
    main()
