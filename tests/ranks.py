"""Ranks: gloo processes of this machine, none of which outlives its test, and a single one.

A rank is forked from a server, one for each process of pytest, that has imported what ranks need
and has computed nothing: the imports take ten seconds of CPU time, mostly longer than the work.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_ettin import pretrain
from megatron_ettin.config import parse_args
from megatron_ettin.ending import end_with_parent
from megatron_ettin.evaluation.layouts import Layout

ROOT = Path(__file__).parents[1]
#: Imported once by the server: this module, and what training imports when it begins.
PRELOADED = (
    "tests.ranks",
    "megatron_ettin.data.corpus_tokenizer",
    "megatron_ettin.training.loop",
    "megatron_ettin.training.start_checks",
)


def _context() -> ForkServerContext | SpawnContext:
    """Return how ranks start; with GPUs each one imports, as CUDA's libraries may not be forked."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


@contextmanager
def started_ranks(
    program: Callable[..., object],
    arguments: Sequence[object],
    *,
    ranks: int,
    logs: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[list[BaseProcess]]:
    """Call `program` in each rank, output in logs/rankN.log; no rank outlives the block.

    A rank finds the program by its name, so it is a function of a module. `environment` adds to the
    test's own and to what torchrun sets. Each rank is in a session of its own, so that what it may
    start is killed with it.
    """
    world = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
        "WORLD_SIZE": str(ranks),
        **(environment or {}),
    }
    context = _context()
    processes: list[BaseProcess] = []
    try:
        for rank in range(ranks):
            variables = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(
                target=_be_rank, args=(variables, logs / f"rank{rank}.log", program, arguments)
            )
            process.start()
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            if process.is_alive():
                with suppress(ProcessLookupError):  # it has no session yet, and has started nothing
                    os.killpg(process.pid or 0, signal.SIGKILL)
                process.kill()
            process.join()


def _be_rank(
    variables: Mapping[str, str],
    log: Path,
    program: Callable[..., object],
    arguments: Sequence[object],
) -> None:
    """Become a process like one that torchrun has started, then run the program."""
    end_with_parent(os.getppid())
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))  # too late for the variable
    with log.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    gc.freeze()  # collections need not look at what the server has imported
    program(*arguments)


def run_ranks(
    program: Callable[..., object],
    arguments: Sequence[object],
    *,
    ranks: int,
    logs: Path,
    deadline_seconds: float,
) -> None:
    """Run `program` on all ranks to its end; fail with the output of the first that fails."""
    with started_ranks(program, arguments, ranks=ranks, logs=logs) as processes:
        code, output = _wait_for_all(processes, logs, deadline_seconds)
        assert code == 0, f"ended with {code}:\n{output[-4000:]}"


def run_job(arguments: Sequence[str], *, ranks: int, logs: Path, deadline_seconds: float) -> Any:
    """Run pretrain's command line on all ranks as torchrun would; return its code and output.

    As under torchrun, ranks meet at a store of their launcher, and the first failure ends them all.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": logs.name,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    with started_ranks(
        pretrain_main, [arguments], ranks=ranks, logs=logs, environment=environment
    ) as processes:
        return _wait_for_all(processes, logs, deadline_seconds)


def pretrain_main(arguments: Sequence[str]) -> None:
    """Run pretrain's command line. "{RANK}" in an argument is the rank's number."""
    rank = os.environ["RANK"]
    sys.argv = ["pretrain", *(argument.replace("{RANK}", rank) for argument in arguments)]
    pretrain.main()


def run_layouts(jobs: Sequence[tuple[Layout, list[str]]], *, ranks: int, folder: Path) -> None:
    """Train each job, a layout and pretrain's arguments, one after the other on the same ranks."""
    cases = [
        (layout.processes, port, [*arguments, *layout.arguments(), "--logging.log_every_steps=1"])
        for (layout, arguments), port in zip(jobs, free_ports(len(jobs)), strict=True)
    ]
    run_ranks(_train_cases, [cases], ranks=ranks, logs=folder, deadline_seconds=900.0)


def _train_cases(cases: Sequence[tuple[int, int, list[str]]]) -> None:
    """Train, in one rank, each case that has this rank: its processes, their port, arguments."""
    for processes, port, arguments in cases:
        if int(os.environ["RANK"]) < processes:
            os.environ["WORLD_SIZE"] = str(processes)
            os.environ["MASTER_PORT"] = str(port)
            pretrain.pretrain(parse_args(arguments))
            gc.collect()  # the run's groups keep 60 threads, which wake a hundred times a second


def _wait_for_all(
    processes: Sequence[BaseProcess], logs: Path, deadline_seconds: float
) -> tuple[int, str]:
    """Return when all have ended, or one has failed: its code, or 0, and the output, its own last.

    The others would wait for it, but may be about to say something: they have a second.
    """
    outputs = [logs / f"rank{rank}.log" for rank in range(len(processes))]
    deadline = time.monotonic() + deadline_seconds
    while True:
        codes = [process.exitcode for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed or None not in codes:
            break
        late = outputs[codes.index(None)]
        assert time.monotonic() < deadline, f"late:\n{late.read_text()[-4000:]}"
        time.sleep(0.05)
    if failed:
        for process in processes:
            process.join(1.0)
        outputs.append(outputs.pop(failed[0]))
    output = "".join(path.read_text() for path in outputs)
    return (codes[failed[0]] or 1 if failed else 0), output


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
