"""Four gloo processes of rank_program.py: started once, given jobs, outliving no test."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.ranks import free_ports, started_ranks

RANKS = 4
#: What a job is run as, and the processes that each takes.
LAYOUTS = {"tp2": 2, "pp2": 2, "tp2pp2": 4}


class Ranks:
    """The processes of a `with` block; their output goes to files in `folder`."""

    def __init__(self, processes: list[subprocess.Popen[str]], folder: Path) -> None:
        self.processes = processes
        self.logs = [folder / f"rank{rank}.log" for rank in range(RANKS)]

    @classmethod
    @contextmanager
    def started(cls, folder: Path) -> Iterator[Ranks]:
        """Start them, and end them with the block."""
        program = Path(__file__).with_name("rank_program.py")
        with started_ranks(program, [], ranks=RANKS, logs=folder) as processes:
            yield cls(processes, folder)

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
