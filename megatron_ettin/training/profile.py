"""Trace of a few steps: the kernels over time, and the share of time that the GPU was idle.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity

from megatron_ettin import distributed

#: Name of the trace in the run's folder; chrome://tracing and https://ui.perfetto.dev read it.
TRACE_FILE = "profile.json"
#: Steps before the trace; the first ones compile kernels and allocate memory.
WARM_UP_STEPS = 5
TRACED_STEPS = 3
#: Number of kernels (on a CPU, operations) in the printed table.
TOP = 20

logger = logging.getLogger(__name__)


@contextmanager
def trace_steps(
    folder: Path, *, warm_up: int = WARM_UP_STEPS, steps: int = TRACED_STEPS
) -> Iterator[Callable[[], None]]:
    """Trace some of the steps in the block; the caller calls the provided function after each.

    Writes folder/TRACE_FILE after `warm_up` (at least 1) + `steps` steps, or what there is of them
    at the block's end, and logs what took longest.
    """
    activities = [ProfilerActivity.CPU]
    if distributed.device().type == "cuda":
        activities.append(ProfilerActivity.CUDA)

    def report(profile: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(folder / TRACE_FILE))
        logger.info("%s", _table(profile, folder / TRACE_FILE))

    schedule = torch.profiler.schedule(wait=warm_up - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(
        activities=activities, schedule=schedule, on_trace_ready=report
    ) as profile:
        yield profile.step
    if profile.step_num <= warm_up:
        logger.warning("profile: nothing was traced, the %d steps are warm-up", profile.step_num)


def kernel_intervals(trace: Path) -> NDArray[np.float64]:
    """Return [n, 2]: begin and end of every kernel in a Chrome trace, in microseconds.

    Copies do not count: they run beside the kernels.
    """
    events = json.loads(trace.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in kernels]
    return np.array(spans, dtype=np.float64).reshape(-1, 2)


def idle_share(intervals: NDArray[np.float64]) -> float:
    """Return the share of the time from the first begin to the last end that no interval covers.

    `intervals` [n, 2], n > 0, are begins and ends in any order; they may overlap, as kernels of
    several streams do.
    """
    begins, ends = intervals[np.argsort(intervals[:, 0])].T
    # An interval adds the part that reaches beyond the latest end of all intervals before it.
    covered = np.maximum.accumulate(ends)
    before = np.concatenate([begins[:1], covered[:-1]])
    busy = np.maximum(ends - np.maximum(begins, before), 0.0).sum()
    return float(1.0 - busy / (covered[-1] - begins[0]))


def _table(profile: torch.profiler.profile, trace: Path) -> str:
    """Return the longest kernels and the GPU's idle share; on a CPU, the longest operations."""
    where = "device" if ProfilerActivity.CUDA in profile.activities else "cpu"
    table = profile.key_averages().table(
        sort_by=f"self_{where}_time_total", row_limit=TOP, max_name_column_width=60
    )
    intervals = kernel_intervals(trace)
    idle = f"GPU idle for {idle_share(intervals):.1%} of the steps\n" if len(intervals) else ""
    return f"profile in {trace}\n{idle}{table}"
