"""CPU seconds and resident memory that a function takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Shortest time over which a function is repeated.
REPEAT_SECONDS = 1


def seconds_of(run: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Return the fastest of many runs in CPU seconds, which a busy machine changes little."""
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < REPEAT_SECONDS:
        begin = clock()
        run()
        taken.append(clock() - begin)
    return min(taken)


def rise_of(run: Callable[[], Any]) -> tuple[Any, float, int]:
    """Return a run's result, seconds, and bytes by which resident memory rose at its peak."""

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    # Writing 5 resets VmHWM to the current resident set; imports have peaked above it.
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = peak(), time.perf_counter()
    result = run()
    return result, time.perf_counter() - begin, peak() - before
