"""The benchmark of single kernels: a figure for each, printed as soon as it is known."""

import json
import sys
import time
from typing import Any

import pytest
import torch

from benchmarks.fake_gpu import fake_gpu
from benchmarks.kernel_times import KERNELS, Sizes
from benchmarks.model_sizes import model_of_size
from megatron_ettin.training.layer_times import CYCLES_PER_SECOND, median_seconds
from tools import bench_kernels


def test_every_kernel_has_its_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--models", "nano", "--rows", "256", "--rounds", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *options])
    bench_kernels.main()
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    attention = {"global attention, sdpa", "local attention, sdpa"}
    assert {each["kernel"] for each in found} == set(KERNELS) | attention
    assert len(found) == len(set(KERNELS) | attention)
    for each in found:
        assert (each["rows"], each["model"], each["channels"]) == (256, "nano", 128)
        assert each["milliseconds"] > 0.0


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_a_kernel_has_gradients(kernel: str) -> None:
    step = KERNELS[kernel](Sizes(model_of_size("nano"), 256))
    gradients = step()
    assert isinstance(gradients, tuple)
    assert all(float(gradient.abs().sum()) > 0.0 for gradient in gradients)


#: What a layer launches, and the bytes that it moves for each row and channel, in bf16.
LAUNCHES = {
    "add and normalise": (["forward_rows", "backward_rows", "sum", "_to_copy"], 16),
    "add, drop and normalise": (["forward_rows", "backward_rows", "sum", "_to_copy"], 18),
    "rotation": (["rotate_rows", "pack_rows"], 20),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kernel", sorted(LAUNCHES))
def test_nothing_is_timed_beside_a_kernel_of_ours(kernel: str) -> None:
    launches, bytes_per_channel = LAUNCHES[kernel]
    sizes = Sizes(model_of_size("nano"), 2**16)
    with fake_gpu() as noted:
        step = KERNELS[kernel](sizes)
        noted.noted.clear()
        step()
    assert [launch.name for launch in noted.noted] == launches
    elements = sizes.rows * sizes.model.hidden_size
    # Statistics of rows, partial sums of weights, positions and cosines are the rest.
    moved = sum(launch.num_bytes for launch in noted.noted) / elements
    assert bytes_per_channel <= moved < 1.02 * bytes_per_channel


@pytest.mark.parametrize("device_alone", [False, True])
def test_a_gpu_waits_until_the_host_has_queued_all_calls(
    device_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    slept: list[float] = []

    class Mark:
        def __init__(self, **_: Any) -> None:
            """Take no time."""

        def record(self) -> None:
            happened.append("mark")

        def elapsed_time(self, _: Any) -> float:
            return 3.0

    def sleep(cycles: int) -> None:
        happened.append("sleep")
        slept.append(cycles / CYCLES_PER_SECOND)

    def step() -> None:
        happened.append("step")
        time.sleep(0.01)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    found = median_seconds(step, untimed=2, timed=3, device_alone=device_alone)
    assert found == 0.003
    begin = ["sleep", "mark"] if device_alone else ["mark"]
    assert happened == ["step"] * 2 + begin + ["step", "mark"] * 3 + ["wait"]
    # Longer than the host needs for the three calls that are timed.
    assert all(seconds >= 0.03 for seconds in slept)
