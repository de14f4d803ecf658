"""One run in every layout: the same losses, the same tokens and the same weights at its end."""

from pathlib import Path

import pytest

from megatron_ettin.evaluation.layouts import (
    LAYOUTS,
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
#: Largest relative difference of a loss, and relative L2 distance of a tensor at the end.
Tolerance = tuple[float, float]
#: Measured: 1.2e-8 (losses are sums in float64) and 1.4e-6.
FP32: Tolerance = (1e-5, 1e-5)
#: Between layouts, both in bf16. Measured: 7.3e-5 and 7.7e-3.
BF16_LAYOUTS: Tolerance = (2e-4, 2e-2)
#: Between bf16 and fp32. Measured: 5.3e-4, and 0.08 for one tensor of the encoder (0.034 for the
#: next, 0.017 for the median): Adam's steps are as long where gradients are small as where they are
#: large, so rounding decides some of them.
BF16_TO_FP32: Tolerance = (1e-3, 1e-1)


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


def require_near(found: Path, expected: Path, tolerance: Tolerance) -> None:
    curve, other = read_curve(found), read_curve(expected)
    assert len(other.losses) >= 15
    assert other.losses[-1] < other.losses[0] - 0.5, "the run must learn something"
    loss = curve.largest_relative_difference(other)
    distance, tensor = largest_weight_difference(final_weights(found), final_weights(expected))
    names = [str(path.relative_to(path.parents[2])) for path in (found, expected)]
    print(f"{' to '.join(names)}: losses {loss:.1e}, weights {distance:.1e} ({tensor})")
    assert curve.token_digest == other.token_digest
    assert loss <= tolerance[0]
    assert distance <= tolerance[1], tensor


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", [case for case in CASES if case != "tp1"])
def test_the_layout_changes_nothing(runs: Path, objective: str, case: str) -> None:
    folder = runs / objective / "fp32"
    require_near(folder / case, folder / "tp1", FP32)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", [case for case in BF16 if case != "tp1"])
def test_the_layout_changes_rounding_in_bf16(runs: Path, objective: str, case: str) -> None:
    folder = runs / objective / "bf16"
    require_near(folder / case, folder / "tp1", BF16_LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", BF16)
def test_bf16_stays_near_fp32(runs: Path, objective: str, case: str) -> None:
    require_near(runs / objective / "bf16" / case, runs / objective / "fp32" / "tp1", BF16_TO_FP32)
