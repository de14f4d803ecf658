"""Two processes that take turns on a GPU: one runs the tests, one the benchmarks.

Both start at once, and import while the other works. One that fails, or takes too long, is replaced
by a new one: after an error a GPU may serve a process no longer. Standard library only.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.gpu.stages import ROOT, Stage, allowance

#: What takes long to import, by kind of process.
IMPORTED_FIRST = {
    "tests": ("tests.gpu.outputs", "tests.training"),
    "benchmarks": ("benchmarks.training_cell", "benchmarks.kernel_times"),
}
#: The exit code of a stage that ran out of time, as timeout(1) has it.
OUT_OF_TIME = 124
GRACE_SECONDS = 10
#: Longest time that a process may take to import.
START_SECONDS = 120
NO_TIME = "not enough time was left"


class Process:
    """One process of tests/gpu/worker.py."""

    def __init__(self, kind: str, folder: Path) -> None:
        """Start it; it imports what it needs beside the caller."""
        worker = ("-m", "tests.gpu.worker")
        self._process = subprocess.Popen(
            [sys.executable, "-u", *worker, str(folder.absolute()), *IMPORTED_FIRST[kind]],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._is_ready = False
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def wait(self, seconds: float) -> int:
        """Wait until it has imported all; return 0, or the exit code if it has ended."""
        if not self._is_ready:
            try:
                self._is_ready = self._answers.get(timeout=max(seconds, 0.0)) is not None
            except queue.Empty:
                return OUT_OF_TIME
        return 0 if self._is_ready else self._process.wait()

    def run(self, name: str, command: Iterable[str], seconds: float) -> dict[str, Any]:
        """Run a stage for at most `seconds` once it is ready; return exit code, counts of tests."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            print(
                json.dumps({"name": name, "command": list(command)}),
                file=self._process.stdin,
                flush=True,
            )
        with suppress(queue.Empty):
            answer = self._answers.get(timeout=seconds)
            return {"exit_code": self._process.wait()} if answer is None else answer
        # Interrupted, so that tests end what they have started.
        self._process.send_signal(signal.SIGINT)
        with suppress(queue.Empty):
            self._answers.get(timeout=GRACE_SECONDS)
        return {"exit_code": OUT_OF_TIME}

    def end(self) -> None:
        """Kill it with all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join()
        for file in (self._process.stdin, self._process.stdout):
            assert file is not None
            with suppress(BrokenPipeError):
                file.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)


class Turns:
    """The processes of a run, by kind."""

    def __init__(self, kinds: Iterable[str], folder: Path) -> None:
        """Start them; they write to `folder`."""
        self._folder = folder
        self._processes = {kind: Process(kind, folder) for kind in kinds}

    def run(self, stage: Stage, command: Iterable[str], end: float) -> dict[str, Any]:
        """Run a stage in its process, by `end` on the monotonic clock.

        Returns:
            Seconds, exit code, counts of tests; or why it was skipped. Its own time begins when its
            process is ready.
        """
        begin = time.monotonic()
        with (self._folder / "log.txt").open("a") as log:
            log.write(f"\n===== {stage.name}\n")
        process = self._processes[stage.process]
        ended: dict[str, Any] = {"exit_code": process.wait(min(START_SECONDS, end - begin))}
        seconds = allowance(stage, end - time.monotonic())
        if seconds is None:
            return {"skipped_because": NO_TIME}
        if ended["exit_code"] == 0:
            ended = process.run(stage.name, command, seconds)
        if ended["exit_code"] != 0:
            process.end()
            self._processes[stage.process] = Process(stage.process, self._folder)
        return {"seconds": round(time.monotonic() - begin, 1), **ended}

    def end(self) -> None:
        """End all of them."""
        for process in self._processes.values():
            process.end()
