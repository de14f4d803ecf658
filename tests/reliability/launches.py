"""Runs under torchrun's agent, their processes, and what a kill at a chosen moment leaves of them.

A launch is `torchrun` as a user calls it, or its agent alone: forked, with ranks that are forked,
from the server of tests/ranks.py, because imports take ten seconds of CPU time for each launch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.ranks import pretrain_main, started_ranks

RANKS = 2
#: Restarts by the agent; after these the launch fails, and the same command is given again.
RESTARTS = 2
#: In the environment of all processes of a launch under torchrun.
MARK = "LAUNCH_OF_THIS_TEST"
#: Longest life of a process after those that it belongs to were killed.
ORPHAN_SECONDS = 10.0


@dataclass(frozen=True)
class Launch:
    """A started command: its agent's process id, and how to ask for its exit code."""

    agent: int
    mark: str | None
    """A variable with its value that only this launch's processes have in their environment."""
    exit_code: Callable[[], int | None]
    """The agent's exit code; None while it runs."""

    def alive(self) -> list[int]:
        """List the processes that run, or are stopped."""
        return [pid for pid in _processes() if self._owns(pid)]

    def ranks(self) -> list[int]:
        """List the ranks: the processes that the agent has started."""
        return [pid for pid in _processes() if _status(pid)[1] == self.agent]

    def stopped(self) -> list[int]:
        """List the ranks that are stopped (SIGSTOP)."""
        return [pid for pid in self.ranks() if _status(pid)[0] == "T"]

    def _owns(self, pid: int) -> bool:
        """Tell by a mark in the environment, or by the session, of which forked ranks are part."""
        state, _, session = _status(pid)
        if state in "ZX" or not state:
            return False
        if session == self.agent or self.mark is None:
            return session == self.agent
        with suppress(OSError):
            return self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        return False

    def wait_until_gone(self) -> list[int]:
        """Wait for the end of all processes; return those that outlive the time allowed."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while (left := self.alive()) and time.monotonic() < deadline:
            self.exit_code()  # takes the agent's exit code, or it would stay as a zombie
            time.sleep(0.02)
        return left


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _status(pid: int) -> tuple[str, int, int]:
    """Return state, parent and session of a process; nothing if it is gone."""
    try:
        # The second field is the program's name in brackets, and may hold any character.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0, 0
    return fields[0], int(fields[1]), int(fields[3])


@contextmanager
def torchrun(arguments: Sequence[str], folder: Path, log: Path) -> Iterator[Launch]:
    """Start the command of a user in `folder`; nothing of it outlives the block."""
    mark = f"{MARK}={os.urandom(8).hex()}"
    name, _, value = mark.partition("=")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={RANKS}", f"--max-restarts={RESTARTS}"),
        *("-m", "megatron_ettin.pretrain", *arguments),
    ]
    environment = {**os.environ, name: value, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    launch = Launch(process.pid, mark, process.poll)
    try:
        yield launch
    finally:
        kill(launch.alive())
        process.wait()


@contextmanager
def forked_agent(
    arguments: Sequence[str],
    folder: Path,
    log: Path,
    program: Callable[[Sequence[str]], None] = pretrain_main,
) -> Iterator[Launch]:
    """Start torchrun's agent on forked ranks of `program`; nothing of it outlives the block."""
    logs = log.with_suffix(".d")
    logs.mkdir(exist_ok=True)
    with started_ranks(be_agent, [program, arguments, folder], ranks=1, logs=logs) as (process,):
        # Forked processes are found by their session alone: their environment is the server's.
        launch = Launch(process.pid or 0, None, lambda: process.exitcode)
        try:
            yield launch
        finally:
            kill(launch.alive())
            process.join()
    said = logs / "rank0.log"
    if said.exists():  # a kill may come before it
        with log.open("ab") as file:
            file.write(said.read_bytes())


def be_agent(
    program: Callable[[Sequence[str]], None], arguments: Sequence[str], folder: Path
) -> None:
    """Do what `torchrun --standalone` does, but fork the ranks."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.chdir(folder)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=RANKS,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=RESTARTS,
        monitor_interval=0.1,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(),
    )
    elastic_launch(config, be_forked_rank)(program, list(arguments))


def be_forked_rank(program: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> None:
    """Run the program, with a new process's signal handlers instead of the agent's."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    program(arguments)


def kill(processes: Sequence[int]) -> None:
    """Send SIGKILL to all of them."""
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
