"""One run in every layout: the same losses, the same tokens and the same weights at its end."""

from pathlib import Path

import pytest

from megatron_ettin.evaluation.layouts import (
    LAYOUTS,
    Curve,
    final_weights,
    largest_weight_difference,
    read_curve,
)
from tests.conftest import TinyCorpus
from tests.ranks import run_layouts

OBJECTIVES = ("MaskedLM", "CausalLM")
#: Cases: a layout and what else its command line says. Rows are of 128, then of 256 slots.
CASES = {name: (name, ["--hardware.micro_batch_tokens=512"]) for name in LAYOUTS} | {
    f"micro_batch_{rows}": ("tp1", [f"--hardware.micro_batch_tokens={256 * rows}"])
    for rows in (1, 4)
}
BF16 = ("tp1", "tp2", "tp2sp", "pp2", "dp2", "cp2")
#: In fp32, relative to the loss; measured: below 1e-8 (losses are sums in float64).
LOSS_TOLERANCE = 1e-5
#: In fp32, the relative L2 distance of a tensor at the end.
WEIGHT_TOLERANCE = 1e-5
BF16_LOSS_TOLERANCE = 2e-3
BF16_WEIGHT_TOLERANCE = 2e-2


@pytest.fixture(scope="module")
def runs(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs/OBJECTIVE/PRECISION/CASE."""
    folder = tmp_path_factory.mktemp("layouts")
    jobs = []
    for objective in OBJECTIVES:
        config = tiny_corpus.write_config(folder / f"{objective}.yaml", objective=objective)
        for precision, names in (("fp32", CASES), ("bf16", BF16)):
            for name in names:
                layout, overrides = CASES[name]
                arguments = [
                    f"--config={config}",
                    *overrides,
                    "--model.num_attention_heads=4",
                    f"--hardware.precision={precision}",
                    f"--run_dir={folder / objective / precision / name}",
                ]
                jobs.append((LAYOUTS[layout], arguments))
    run_layouts(jobs, ranks=4, folder=folder)
    return folder


def reference(runs: Path, objective: str, precision: str) -> tuple[Path, Curve]:
    folder = runs / objective / precision / "tp1"
    curve = read_curve(folder)
    assert len(curve.losses) >= 15
    assert curve.losses[-1] < curve.losses[0] - 0.5, "the run must learn something"
    return folder, curve


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", [case for case in CASES if case != "tp1"])
def test_the_layout_changes_nothing(runs: Path, objective: str, case: str) -> None:
    folder, expected = reference(runs, objective, "fp32")
    curve = read_curve(runs / objective / "fp32" / case)
    assert curve.largest_relative_difference(expected) <= LOSS_TOLERANCE
    assert curve.token_digest == expected.token_digest
    distance, tensor = largest_weight_difference(
        final_weights(runs / objective / "fp32" / case), final_weights(folder)
    )
    print(objective, case, curve.largest_relative_difference(expected), distance, tensor)
    assert distance <= WEIGHT_TOLERANCE, tensor


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", BF16)
def test_bf16_stays_near(runs: Path, objective: str, case: str) -> None:
    """Between layouts in bf16, and of bf16 to fp32: rounding, and nothing larger."""
    folder, expected = reference(runs, objective, "fp32")
    curve = read_curve(runs / objective / "bf16" / case)
    assert curve.token_digest == expected.token_digest
    distance, tensor = largest_weight_difference(
        final_weights(runs / objective / "bf16" / case), final_weights(folder)
    )
    print(objective, case, curve.largest_relative_difference(expected), distance, tensor)
    assert curve.largest_relative_difference(expected) <= BF16_LOSS_TOLERANCE
    assert distance <= BF16_WEIGHT_TOLERANCE, tensor
