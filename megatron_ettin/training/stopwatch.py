"""Stopwatch of the device: it adds up times without waiting for a GPU.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Seconds that the device spends between `begin` and `end`; only reading waits for it."""

    def __init__(self) -> None:
        """Start at zero."""
        self._begin: Any = None
        self._times: list[tuple[Any, Any]] = []

    def begin(self) -> None:
        """Begin a time; one that has begun and not ended is dropped."""
        self._begin = _moment()

    def end(self) -> None:
        """End the time that has begun, and add it; nothing if none has begun."""
        if self._begin is not None:
            self._times.append((self._begin, _moment()))
            self._begin = None

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Add the time of the block."""
        self.begin()
        yield
        self.end()

    def seconds(self) -> float:
        """Return the sum; on a GPU, wait for the last time to end."""
        if not torch.cuda.is_available():
            return sum(end - begin for begin, end in self._times)
        for _, end in self._times[-1:]:
            end.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._times) / 1000.0

    def mean_seconds(self) -> float:
        """Return the mean; 0 without times."""
        return self.seconds() / max(len(self._times), 1)


def _moment() -> Any:
    """Return the time now, or on a GPU an event that its queue of work stamps with the time."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
