"""A checkpoint of a GPU on a CPU, and back: the same weights, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.conftest import run_without_gpu
from tests.gpu.weights import load, save

pytestmark = pytest.mark.gpu


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that only one side has, or that differ in a value."""
    return [
        name
        for name in sorted(found | expected)
        if name not in found
        or name not in expected
        or not torch.equal(found[name].float(), expected[name].float())
    ]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_a_gpu_saves_loads_on_a_cpu(tmp_path: Path, precision: str) -> None:
    expected = save(tmp_path / "checkpoint", "bf16")
    file = tmp_path / "found.pt"
    run_without_gpu("tests.gpu.weights", "load", precision, str(tmp_path / "checkpoint"), str(file))
    assert differing(torch.load(file), expected) == []


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_a_cpu_saves_loads_on_a_gpu(tmp_path: Path, precision: str) -> None:
    file = tmp_path / "expected.pt"
    run_without_gpu("tests.gpu.weights", "save", "bf16", str(tmp_path / "checkpoint"), str(file))
    assert differing(load(tmp_path / "checkpoint", precision), torch.load(file)) == []
