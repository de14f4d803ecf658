"""The benchmark of single kernels: a figure for each, printed as soon as it is known."""

import json
import sys

import pytest

from benchmarks.kernel_times import KERNELS, Sizes
from benchmarks.model_sizes import model_of_size
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
