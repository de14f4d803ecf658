"""One run under every layout: the same losses to 1e-5 and the same tokens, in fp32."""

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
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("tp2", []),
        ("pp2", []),
        ("tp2pp2", []),
        # Fewer slots in a micro-batch, so that more of them make up a step.
        ("dp2", ["--hardware.micro_batch_tokens=256"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_layout_changes_nothing(
    reference: tuple[Path, Curve], name: str, overrides: list[str], tmp_path: Path
) -> None:
    config, expected = reference
    curve = run_layout(LAYOUTS[name], [f"--config={config}", *overrides], tmp_path / name)
    assert len(curve.losses) >= 15
    assert curve.losses[-1] < curve.losses[0] - 0.5, "the run must learn something"
    assert curve.largest_relative_difference(expected) <= TOLERANCE
    assert curve.token_digest == expected.token_digest
