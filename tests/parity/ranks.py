"""Start rank_program.py on four gloo processes, and let none of them outlive the test."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
RANKS = 4
DEADLINE_SECONDS = 240


def run_ranks(output: Path, checkpoints: Sequence[Path]) -> None:
    """Run all ranks to their end; fail with the output of the first that fails or is late."""
    ports = free_ports(2)
    command = [sys.executable, str(Path(__file__).with_name("rank_program.py")), str(output)]
    command += [str(ports[1]), *map(str, checkpoints)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ports[0]),
        "WORLD_SIZE": str(RANKS),
    }
    processes: list[subprocess.Popen[bytes]] = []
    logs = [output / f"rank{rank}.log" for rank in range(RANKS)]
    try:
        for rank, log in enumerate(logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("wb") as file:
                processes.append(
                    subprocess.Popen(
                        command, env=environment | own, stdout=file, stderr=subprocess.STDOUT
                    )
                )
        wait_for_all(processes, logs)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for_all(processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> None:
    """Return when all have ended well; the others would wait for one that has failed."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        codes = [process.poll() for process in processes]
        for code, log in zip(codes, logs, strict=True):
            assert not code, f"{log.stem} ended with {code}:\n{log.read_text()[-4000:]}"
        if None not in codes:
            return
        late = codes.index(None)
        assert time.monotonic() < deadline, f"late:\n{logs[late].read_text()[-4000:]}"
        time.sleep(0.1)


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
