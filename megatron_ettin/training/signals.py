"""End of a run by a signal or by the file `stop`: the ranks agree on the step, save, and end."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_ettin import distributed

logger = logging.getLogger(__name__)

#: A scheduler may signal torchrun and its ranks, and torchrun passes the signal on: what arrives
#: within this time after the first signal is the same request.
SAME_REQUEST_SECONDS = 3.0
#: EX_TEMPFAIL of <sysexits.h>: "the user is invited to retry".
REQUEUE_CODE = 75


class StopRequest(IntEnum):
    """Reason to save and to end after this step; of several, the largest counts."""

    NONE = 0
    FILE = 1
    """Somebody made the file `stop`."""
    REQUEUE = 2
    """SIGUSR1."""
    TERMINATE = 3
    """SIGTERM."""

    @property
    def exit_code(self) -> int:
        """Exit code of every rank of a run that ended for this reason before its last step."""
        codes = {self.REQUEUE: REQUEUE_CODE, self.TERMINATE: 128 + signal.SIGTERM}
        return codes.get(self, 0)

    @property
    def reason(self) -> str:
        """The reason in words; empty if there is none."""
        return ("", "the file `stop` is there", "SIGUSR1", "SIGTERM")[self]


OF_SIGNAL = {signal.SIGTERM: StopRequest.TERMINATE, signal.SIGUSR1: StopRequest.REQUEUE}


class StopSignals:
    """Requests to stop that reach this rank inside the block; before it, a signal ends the rank.

    The first signal asks for the end, a later one ends the process at once, with its code and
    without saving. A thread receives them, because Python's own handlers wait for the main thread,
    which may wait for another rank.
    """

    def __init__(self, stop_file: Path) -> None:
        """Take the file by which somebody may ask too. All ranks call this."""
        self.request = StopRequest.NONE
        self._stop_file = stop_file
        self._is_main = distributed.is_main_rank()
        self._group = distributed.cpu_group()
        self._signalled = StopRequest.NONE
        self._asked_at = math.inf

    @property
    def seconds_since_asked(self) -> float:
        """Seconds since this rank got the first signal, or since all agreed; 0 before that."""
        return max(0.0, time.monotonic() - self._asked_at)

    def agree(self) -> StopRequest:
        """Return the request that counts after this step, the same on all ranks.

        All ranks call this after every step, and rank 0 alone looks for the file. Signals reach the
        ranks at different moments, and maybe only some of them, so one all-reduce takes the maximum
        of what each rank has received so far. It runs on the CPU: no rank waits for its GPU. It
        cannot lock up: all ranks take the same steps, so they come here equally often.
        """
        own = self._signalled
        if self._is_main and self._stop_file.exists():
            own = max(own, StopRequest.FILE)
        self.request = StopRequest(distributed.largest(own, self._group))
        if self.request is not StopRequest.NONE:
            self._asked_at = min(self._asked_at, time.monotonic())
        return self.request

    def __enter__(self) -> StopSignals:
        """Receive signals from here on."""
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        # With a handler of Python, the interpreter writes each signal's number into the pipe.
        self._before: dict[int, Any] = {n: signal.signal(n, lambda *_: None) for n in OF_SIGNAL}
        for number in OF_SIGNAL:
            signal.siginterrupt(number, False)  # spares libraries the interrupted system calls
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._receive, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore what signals did before."""
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write_end)
        self._thread.join()
        os.close(self._read_end)

    def _receive(self) -> None:
        """Note the first signal, and end the process at another one, until the pipe is closed."""
        first = 0.0
        while numbers := os.read(self._read_end, 64):
            for number in numbers:
                if number not in OF_SIGNAL:
                    continue
                name = signal.Signals(number).name
                if self._signalled is StopRequest.NONE:
                    first = time.monotonic()
                    self._asked_at = min(self._asked_at, first)
                    logger.warning("%s: the run ends after this step, and saves", name)
                elif time.monotonic() - first > SAME_REQUEST_SECONDS:
                    print(f"{name}, again: ended without saving", file=sys.stderr, flush=True)
                    os._exit(OF_SIGNAL[signal.Signals(number)].exit_code)
                self._signalled = max(self._signalled, OF_SIGNAL[signal.Signals(number)])
