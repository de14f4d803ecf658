"""The trace of a few steps: which steps are in it, and what its intervals say."""

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ettin.training.profile import (
    TRACE_FILE,
    idle_share,
    kernel_intervals,
    trace_steps,
)


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([(0, 4)], 0.0),
        ([(0, 1), (3, 4)], 0.5),
        ([(3, 4), (0, 1)], 0.5),  # in any order
        ([(0, 1), (1, 2)], 0.0),
        ([(0, 8), (1, 2), (9, 10)], 0.1),  # one inside another, of another stream
        ([(0, 2), (1, 3), (5, 10)], 0.2),
        ([(2, 2), (2, 3), (7, 7), (7, 12)], 0.4),  # kernels too short for the clock
    ],
)
def test_idle_share(intervals: list[tuple[float, float]], expected: float) -> None:
    assert idle_share(np.array(intervals, dtype=np.float64)) == pytest.approx(expected)


def test_idle_share_is_that_of_the_ticks_without_any_interval() -> None:
    rng = np.random.default_rng(0)
    for _, count in itertools.product(range(50), (1, 3, 20)):
        begins = rng.integers(0, 200, count)
        ends = begins + rng.integers(1, 20, count)
        busy = {tick for a, b in zip(begins, ends, strict=True) for tick in range(a, b)}
        span = ends.max() - begins.min()
        found = idle_share(np.stack([begins, ends], axis=1).astype(np.float64))
        assert found == pytest.approx(1.0 - len(busy) / span, abs=1e-12)


def test_only_kernels_count(tmp_path: Path) -> None:
    events = [
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 10.5, "dur": 2.25},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 11, "dur": 9},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "ProfilerStep#1", "ts": 0, "dur": 99},
        {"ph": "s", "name": "ac2g", "ts": 1},
        {"ph": "X", "cat": "kernel", "name": "softmax", "ts": 20, "dur": 1},
    ]
    (tmp_path / TRACE_FILE).write_text(json.dumps({"traceEvents": events}))
    assert kernel_intervals(tmp_path / TRACE_FILE).tolist() == [[10.5, 12.75], [20.0, 21.0]]


def test_the_steps_after_the_warm_up_are_traced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with trace_steps(tmp_path, warm_up=2, steps=2) as step_done:
        for number in range(6):
            with torch.profiler.record_function(f"step {number}"):
                torch.ones(8).exp()
            step_done()
    events = json.loads((tmp_path / TRACE_FILE).read_text())["traceEvents"]
    names = [event.get("name", "") for event in events if event.get("ph") == "X"]
    assert [name for name in names if name.startswith("step ")] == ["step 2", "step 3"]
    assert "aten::exp" in caplog.text


def test_a_run_that_ends_before_the_trace_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with trace_steps(tmp_path, warm_up=3, steps=2) as step_done:
        step_done()
    assert "nothing was traced, the 1 steps are warm-up" in caplog.text
    assert not (tmp_path / TRACE_FILE).exists()
