"""Time of blocks on the device, without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Seconds that the device spends inside `measure` blocks; only reading waits for the device."""

    def __init__(self) -> None:
        """Start at zero."""
        self._times: list[tuple[Any, Any]] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Add the time of the block."""
        begin = _moment()
        yield
        self._times.append((begin, _moment()))

    def seconds(self) -> float:
        """Return the sum; on a GPU, wait for the last block to end."""
        if not torch.cuda.is_available():
            return sum(end - begin for begin, end in self._times)
        for _, end in self._times[-1:]:
            end.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._times) / 1000.0


def _moment() -> Any:
    """Return the time now, or on a GPU an event that its queue of work stamps with the time."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
