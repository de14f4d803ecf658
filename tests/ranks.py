"""Ranks: gloo processes of this machine, none of which outlives its test, and a single one."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_ettin.evaluation.layouts import Layout

ROOT = Path(__file__).parents[1]


@contextmanager
def started_ranks(
    program: Path, arguments: Sequence[str], *, ranks: int, logs: Path
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start `program` on all ranks, output in logs/rankN.log; none outlives the block.

    Each is in a session of its own, so that what a rank may start is killed with it.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
        "WORLD_SIZE": str(ranks),
    }
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(ranks):
            with (logs / f"rank{rank}.log").open("w") as file:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(program), *arguments],
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.PIPE,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        text=True,
                        start_new_session=True,
                    )
                )
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def run_ranks(
    program: Path, arguments: Sequence[str], *, ranks: int, logs: Path, deadline_seconds: float
) -> None:
    """Run `program` on all ranks to its end; fail with the output of the first that fails."""
    with started_ranks(program, arguments, ranks=ranks, logs=logs) as processes:
        _wait_for_all(
            processes, [logs / f"rank{rank}.log" for rank in range(ranks)], deadline_seconds
        )


def run_layouts(jobs: Sequence[tuple[Layout, list[str]]], *, ranks: int, folder: Path) -> None:
    """Train each job, a layout and pretrain's arguments, one after the other on the same ranks."""
    ports = free_ports(len(jobs))
    cases = [
        {
            "processes": layout.processes,
            "port": port,
            "arguments": [*arguments, *layout.arguments(), "--logging.log_every_steps=1"],
        }
        for (layout, arguments), port in zip(jobs, ports, strict=True)
    ]
    (folder / "jobs.json").write_text(json.dumps(cases))
    run_ranks(
        Path(__file__).with_name("layout_program.py"),
        [str(folder / "jobs.json")],
        ranks=ranks,
        logs=folder,
        deadline_seconds=900.0,
    )


def _wait_for_all(
    processes: Sequence[subprocess.Popen[str]], outputs: Sequence[Path], deadline_seconds: float
) -> None:
    """Return when all have ended well; the others would wait for one that has failed."""
    deadline = time.monotonic() + deadline_seconds
    while True:
        codes = [process.poll() for process in processes]
        for code, output in zip(codes, outputs, strict=True):
            assert not code, f"{output.stem} ended with {code}:\n{output.read_text()[-4000:]}"
        if None not in codes:
            return
        late = outputs[codes.index(None)]
        assert time.monotonic() < deadline, f"late:\n{late.read_text()[-4000:]}"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Return different ports of this machine that nobody listens on.

    Below those that a system gives to connections by itself, so that they are still free when a
    case of some minutes later needs them.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_768), 12_768):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                ports.append(port)
        if len(ports) == count:
            return ports
    raise OSError(f"fewer than {count} ports are free")


def lone_rank() -> Any:
    """Return the process groups of a single rank, as far as the attention asks for them."""
    return SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
