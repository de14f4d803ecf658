"""One run under every layout: the same losses to 1e-5, the same tokens; fp32, 20 steps and more."""

from pathlib import Path

import pytest

from megatron_ettin.evaluation.layouts import LAYOUTS, Curve, run_layout
from tests.conftest import TinyCorpus

#: Measured: below 1e-8 (losses are sums in float64 of float32 terms).
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["MaskedLM", "CausalLM"])
def reference(
    request: pytest.FixtureRequest,
    tiny_corpus: TinyCorpus,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Curve]:
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny_corpus.write_config(folder / "run.yaml", objective=request.param)
    return config, run_layout(LAYOUTS["tp1"], [f"--config={config}"], folder / "tp1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2", "pp2", "dp2", "tp2pp2"])
def test_the_layout_changes_nothing(
    reference: tuple[Path, Curve], name: str, tmp_path: Path
) -> None:
    config, expected = reference
    curve = run_layout(LAYOUTS[name], [f"--config={config}"], tmp_path / name)
    assert len(curve.losses) >= 15
    assert curve.losses[-1] < curve.losses[0] - 0.5, "the run must learn something"
    assert curve.largest_relative_difference(expected) <= TOLERANCE
    assert curve.token_digest == expected.token_digest


@pytest.mark.slow
def test_the_micro_batch_changes_nothing(reference: tuple[Path, Curve], tmp_path: Path) -> None:
    config, expected = reference
    curve = run_layout(
        LAYOUTS["dp2"],
        [f"--config={config}", "--hardware.micro_batch_tokens=256"],
        tmp_path / "run",
    )
    assert curve.largest_relative_difference(expected) <= TOLERANCE
    assert curve.token_digest == expected.token_digest
