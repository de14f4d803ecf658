"""Four gloo processes of rank_program.py: started once, given jobs, outliving no test."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
RANKS = 4
#: What a job is run as, and the processes that each takes.
LAYOUTS = {"tp2": 2, "pp2": 2, "tp2pp2": 4}


class Ranks:
    """The processes, between `with` and its end; their output goes to files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.logs = [folder / f"rank{rank}.log" for rank in range(RANKS)]
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Ranks:
        command = [sys.executable, str(Path(__file__).with_name("rank_program.py"))]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
        }
        for rank, log in enumerate(self.logs):
            with log.open("w") as file:
                process = subprocess.Popen(
                    command,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            self.processes.append(process)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def run(
        self,
        checkpoint: Path,
        expected: Path,
        output: Path,
        *,
        saving: Sequence[str],
        deadline: float,
    ) -> dict[str, float]:
        """Return the difference from `expected` by layout; those of `saving` leave output/LAYOUT.

        Fails with the output of the first rank that ends, or is late by `deadline` seconds.
        """
        job = {
            "checkpoint": str(checkpoint),
            "expected": str(expected),
            "output": str(output),
            "saving": saving,
            "ports": free_ports(3),
        }
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        answers = [output / f"{layout}.json" for layout in LAYOUTS]
        end = time.monotonic() + deadline
        while not all(answer.exists() for answer in answers):
            for process, log in zip(self.processes, self.logs, strict=True):
                assert process.poll() is None, f"{log.stem} ended:\n{log.read_text()[-4000:]}"
            late = "\n".join(log.read_text()[-1000:] for log in self.logs)
            assert time.monotonic() < end, f"late:\n{late}"
            time.sleep(0.05)
        return {answer.stem: json.loads(answer.read_text()) for answer in answers}


def free_ports(count: int) -> list[int]:
    """Return different ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
