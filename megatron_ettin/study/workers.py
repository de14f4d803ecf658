"""Child processes that run a study's stages: one for the whole machine, one for each device."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

import torch

from megatron_ettin.study.child import begin_worker
from megatron_ettin.study.machine import worker_environments
from megatron_ettin.study.stages import Stage

#: Message of a stage whose process is gone.
KILLED = (
    "its process was killed, as the kernel does when memory runs out: lower batch sizes, or run "
    "it on a machine with more memory"
)


class Worker:
    """A child process that runs stages one after another; a new one follows one that was killed.

    Evaluations so import their libraries once, and a stage that the kernel kills for its memory
    does not take the study along. The child ends with this process, however that ends.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Start nothing yet; the child gets these variables beside this process's own."""
        self._environment = dict(environment)
        self._pool: ProcessPoolExecutor | None = None
        self._pid = 0

    def start(self, stage: Stage, log: Path) -> Future[str | None]:
        """Begin a stage, with its output appended to `log`; the future is that of `result`."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                max_workers=1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=begin_worker,
                initargs=(os.getpid(), self._environment),
            )
            self._pid = self._pool.submit(os.getpid).result()
        return self._pool.submit(run_logged, stage, log)

    def result(self, ended: Future[str | None]) -> str | None:
        """Return the message of the stage's failure, None if it went well."""
        try:
            return ended.result()
        except BrokenProcessPool:
            self.close()
            return KILLED

    def kill(self) -> None:
        """Kill the child, if there is one; `close` follows."""
        if self._pool is not None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """End the child, if there is one."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


class Workers:
    """The workers of a study, for a `with` block that ends them."""

    def __init__(self, num_devices: int) -> None:
        """Start nothing yet."""
        self._machine = Worker({})
        self._devices = [Worker(each) for each in worker_environments(num_devices)]
        self._busy: set[Worker] = set()

    def take(self, stage: Stage) -> Worker | None:
        """Return a worker for a stage, or None while all that it may have are busy."""
        suited = [self._machine] if stage.runs_alone else self._devices
        worker = next((each for each in suited if each not in self._busy), None)
        if worker is not None:
            self._busy.add(worker)
        return worker

    def give_back(self, worker: Worker) -> None:
        """Take back a worker whose stage has ended."""
        self._busy.remove(worker)

    def __enter__(self) -> Workers:
        """Start nothing yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the children; after an error they may still work, and are killed."""
        for worker in (self._machine, *self._devices):
            if kind is not None:
                worker.kill()
            worker.close()


def run_logged(stage: Stage, log: Path) -> str | None:
    """Run a stage in this process with all output appended to a file; return why it failed."""
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
