"""Twenty steps on a GPU against the same steps on a CPU in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_ettin.evaluation.layouts import Curve, read_curve
from tests.gpu.conftest import BACKENDS, run_without_gpu, skip_without
from tests.training import train_here

pytestmark = pytest.mark.gpu

#: Largest relative difference of a loss, held-out ones too. In fp32 only the order of sums differs,
#: which twenty updates carry on; bf16 rounds each value to 8 bits and averages over 600 positions.
FP32_LOSSES, BF16_LOSSES = 1e-3, 1e-2


@dataclass(frozen=True)
class OnCpu:
    """A run of twenty steps on the CPU."""

    arguments: list[str]
    curve: Curve


@pytest.fixture(scope="module", params=["MaskedLM", "CausalLM"])
def on_cpu(
    request: pytest.FixtureRequest, twenty_steps: Path, tmp_path_factory: pytest.TempPathFactory
) -> OnCpu:
    arguments = [f"--config={twenty_steps}", f"--objective={request.param}"]
    run_dir = tmp_path_factory.mktemp(request.param) / "cpu"
    reports = f"--run_dir={run_dir}", "--logging.log_every_steps=1"
    run_without_gpu("megatron_ettin.pretrain", *arguments, *reports)
    return OnCpu(arguments, read_curve(run_dir))


def test_fp32_follows_the_cpu(on_cpu: OnCpu, tmp_path: Path) -> None:
    curve = train_here(on_cpu.arguments, tmp_path / "run")
    assert len(curve.losses) >= 20
    assert curve.token_digest == on_cpu.curve.token_digest
    assert curve.largest_relative_difference(on_cpu.curve) <= FP32_LOSSES


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_follows_the_cpus_fp32(on_cpu: OnCpu, backend: str, tmp_path: Path) -> None:
    skip_without(backend)
    options = [f"--model.backend={backend}", "--hardware.precision=bf16"]
    curve = train_here([*on_cpu.arguments, *options], tmp_path / "run")
    assert curve.token_digest == on_cpu.curve.token_digest
    assert curve.largest_relative_difference(on_cpu.curve) <= BF16_LOSSES
