"""`hardware.cuda_graphs`: passes from graphs train what the same passes train without."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from megatron_ettin.evaluation.layouts import (
    Layout,
    final_weights,
    largest_weight_difference,
    read_curve,
)
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.training import graphs
from tests.gpu.conftest import BACKENDS, skip_without
from tests.ranks import run_layouts
from tests.training import train_here

pytestmark = pytest.mark.gpu

#: Largest relative difference of a loss: sums in another order, rounded to 8 bits and less.
FP8_LOSSES = 1e-2
#: And of the gradient's norm in the first steps. Adam divides by it, so losses alone would not show
#: that one of a step's two micro-batches is lost, which changes the norm by 30 % or more.
FP8_NORMS, FIRST_STEPS = 0.1, 5
#: Algorithms that repeat their sums, so that graphs have to repeat them too.
HARDWARE = {"precision": "bf16", "deterministic": True}


@pytest.mark.parametrize("objective", ["MaskedLM", "CausalLM"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_change_no_bit(
    twenty_steps: Path, tmp_path: Path, backend: str, objective: str
) -> None:
    skip_without(backend)
    arguments = [
        f"--config={twenty_steps}",
        f"--model.backend={backend}",
        f"--objective={objective}",
    ]
    plain, graphed = tmp_path / "plain", tmp_path / "graphs"
    jobs = [
        (Layout(1, {**HARDWARE, "cuda_graphs": captures}), [*arguments, f"--run_dir={folder}"])
        for captures, folder in ((False, plain), (True, graphed))
    ]
    # In a process of its own, because libraries read their settings when they are first used.
    run_layouts(jobs, ranks=1, folder=tmp_path)
    assert read_curve(graphed) == read_curve(plain)
    assert largest_weight_difference(final_weights(graphed), final_weights(plain))[0] == 0.0


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_graphs_of_fp8_learn_alike(
    twenty_steps: Path, tmp_path: Path, recipe: str, caplog: pytest.LogCaptureFixture
) -> None:
    skip_without("transformer_engine")
    arguments = [
        f"--config={twenty_steps}",
        "--objective=MaskedLM",
        "--hardware.precision=fp8",
        f"--hardware.fp8_recipe={recipe}",
    ]
    plain = train_here(arguments, tmp_path / "plain")
    with caplog.at_level(logging.INFO, logger=graphs.__name__):
        graphed = train_here([*arguments, "--hardware.cuda_graphs=true"], tmp_path / "graphs")
    assert "a CUDA graph for micro-batches" in caplog.text
    assert graphed.token_digest == plain.token_digest
    assert graphed.largest_relative_difference(plain) <= FP8_LOSSES
    norms = [gradient_norms(tmp_path / name)[:FIRST_STEPS] for name in ("graphs", "plain")]
    assert len(norms[0]) == FIRST_STEPS
    assert all(abs(a - b) <= FP8_NORMS * b for a, b in zip(*norms, strict=True))


def gradient_norms(run_dir: Path) -> list[float]:
    """Return the gradient's norm in each step of a run."""
    records = RunFolder(run_dir).read_metrics()
    return [float(record["grad_norm"]) for record in records if record["kind"] == "train"]
