"""Watchdog of a rank: if no step gets finished, the stacks go to a file and the process ends.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from torch._C import _distributed_c10d

from megatron_ettin import distributed
from megatron_ettin.ending import fail

#: Time that the other ranks get for files of their own, once this rank has written its file.
GRACE_SECONDS = 5.0
STDERR = 2


class Watchdog:
    """A thread that ends this rank if the next step takes longer than `hang_seconds`.

    When one rank hangs, the others wait for it in a collective: each of them notices by itself.

    Between two steps of a phase `hang_seconds` is the limit. Other work (the first step of a phase,
    which compiles and allocates, validation, saving) may take as long as a collective may.
    """

    def __init__(self, folder: Path, hang_seconds: float | None) -> None:
        """Take the folder of the files; nothing is watched with None. All ranks call this."""
        self._folder = folder
        self._hang_seconds = hang_seconds
        self._step = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._ranks = distributed.all_gather((platform.node(), os.getpid()))

    def __enter__(self) -> Watchdog:
        """Start to watch."""
        self.expect_long_work()
        if self._hang_seconds is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop to watch."""
        if self._thread is None:
            return
        faulthandler.cancel_dump_traceback_later()
        self._ended.set()
        self._thread.join()

    def step_done(self, step: int) -> None:
        """Begin to wait for the step after `step`."""
        self._step = step
        self._begin(self._hang_seconds)

    @contextmanager
    def long_work(self) -> Iterator[None]:
        """Give the block the time of long work, and begin to wait for a step after it."""
        self.expect_long_work()
        yield
        self._begin(self._hang_seconds)

    def expect_long_work(self) -> None:
        """Begin to wait for a step that may take long, or for the end."""
        if self._hang_seconds is not None:
            self._begin(max(self._hang_seconds, distributed.TIMEOUT.total_seconds()))

    def _begin(self, limit: float | None) -> None:
        if limit is None:
            return
        self._since, self._limit = time.monotonic(), limit
        # For a main thread that blocks in C and keeps Python's lock, so that no other thread of
        # Python runs. This timer needs no lock; it writes to stderr, and ends the process.
        faulthandler.dump_traceback_later(limit + 2 * GRACE_SECONDS, exit=True, file=STDERR)

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._limit / 4)):
            waited = time.monotonic() - self._since
            if waited > self._limit:
                self._write(waited)
                time.sleep(GRACE_SECONDS)
                fail(
                    f"error: no step was finished within {self._limit:g} s of step {self._step}: "
                    f"see the stacks of the ranks in {self._folder}; if nothing hangs there, give "
                    f"a larger --trouble.hang_seconds"
                )

    def _write(self, waited: float) -> None:
        """Append the stacks of all threads to this rank's file, and write its collectives."""
        rank = distributed.rank()
        host, process = self._ranks[rank]
        name = f"step_{self._step:08d}-rank_{rank:04d}"
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"{name}.txt").open("a") as file:
            now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
            file.write(
                f"{now} UTC: rank {rank}, process {process} on {host}: waits since step "
                f"{self._step} for {waited:.1f} s\n"
            )
            for other, (its_host, its_process) in enumerate(self._ranks):
                if its_host == host:
                    file.write(f"rank {other}, process {its_process}: {_state(its_process)}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        (self._folder / f"{name}.collectives.json").write_bytes(_collectives())


def _state(process: int) -> str:
    """Return the kernel's word for the state of a process of this host: `T (stopped)`."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return "gone"
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("State:"))


def _collectives() -> bytes:
    """Return what torch's flight recorder holds of this rank's last collectives, as JSON."""
    if distributed.device().type == "cuda":
        return bytes(_distributed_c10d._dump_nccl_trace_json())  # type: ignore[attr-defined]
    return bytes(_distributed_c10d._dump_fr_trace_json())  # type: ignore[attr-defined]
