"""Learning rates at chosen token counts, against values worked out by hand."""

import itertools
import math
from pathlib import Path
from typing import Any, get_args

import pytest

from megatron_ettin.config import Decay, OptimizerConfig, PhaseConfig
from megatron_ettin.training.optimizer import learning_rate

ROOT = Path(__file__).parents[2]
DECAYS: tuple[Decay, ...] = get_args(Decay)
OPTIMIZER = OptimizerConfig(lr=0.01, weight_decay=0.0, warmup_tokens=100)


def phase(**settings: object) -> PhaseConfig:
    fields = {"name": "p", "train_tokens": 1000, "seq_length": 8, "global_batch_size": 1}
    return PhaseConfig(**{**fields, **settings})  # type: ignore[arg-type]


#: (settings of the phase, tokens of the run, tokens of the phase, rate); each curve needs a row in
#: the middle of its way, worked out by hand.
RATES: list[tuple[dict[str, Any], int, int, float]] = [
    ({}, 0, 0, 0.0),
    ({}, 25, 25, 0.0025),
    ({}, 100, 100, 0.01),
    ({}, 5000, 999, 0.01),
    ({"lr_end": 0.5}, 2000, 0, 0.01),
    ({"lr_end": 0.5}, 2000, 250, 0.01 * (1 - 0.5 * math.sqrt(0.25))),
    ({"lr_end": 0.5}, 2000, 1000, 0.005),
    ({"lr_end": 0.5}, 2000, 1200, 0.005),
    ({"lr_start": 0.5, "lr_end": 0.02}, 2000, 640, 0.01 * (0.5 - 0.48 * 0.8)),
    ({"lr_end": 0.5, "lr_decay": "linear"}, 2000, 250, 0.01 * 0.875),
    ({"lr_end": 0.0, "lr_decay": "linear", "lr_decay_tokens": 200}, 2000, 800, 0.01),
    ({"lr_end": 0.0, "lr_decay": "linear", "lr_decay_tokens": 200}, 2000, 950, 0.0025),
    ({"lr_end": 0.0, "lr_decay": "linear"}, 50, 500, 0.0025),
]


@pytest.mark.parametrize(("settings", "run_tokens", "phase_tokens", "expected"), RATES)
def test_rate(
    settings: dict[str, object], run_tokens: int, phase_tokens: int, expected: float
) -> None:
    rate = learning_rate(
        OPTIMIZER, phase(**settings), run_tokens=run_tokens, phase_tokens=phase_tokens
    )
    assert rate == pytest.approx(expected, rel=1e-12, abs=1e-15)


def rates(decay: Decay, **settings: float) -> list[float]:
    """Return the rate at every twentieth of a phase, after the warm-up."""
    return [
        learning_rate(OPTIMIZER, phase(lr_decay=decay, **settings), run_tokens=5000, phase_tokens=n)
        for n in range(0, 1001, 50)
    ]


@pytest.mark.parametrize("decay", DECAYS)
def test_every_curve_goes_from_its_start_to_its_end(decay: Decay) -> None:
    for start, end in ((1.0, 0.1), (0.2, 0.9)):
        curve = rates(decay, lr_start=start, lr_end=end)
        assert curve[0] == pytest.approx(0.01 * start)
        assert curve[-1] == pytest.approx(0.01 * end)
        assert sorted(curve, reverse=start > end) == curve
        assert len(set(curve)) > 2
        late = rates(decay, lr_start=start, lr_end=end, lr_decay_tokens=200)
        assert late[:17] == [pytest.approx(0.01 * start)] * 17
        assert late[-1] == pytest.approx(0.01 * end)


def test_no_two_curves_are_the_same() -> None:
    for one, other in itertools.combinations(DECAYS, 2):
        assert rates(one, lr_end=0.1) != rates(other, lr_end=0.1), (one, other)


@pytest.mark.parametrize("decay", DECAYS)
def test_every_curve_has_a_rate_worked_out_by_hand_and_is_documented(decay: Decay) -> None:
    middle = [
        settings
        for settings, run_tokens, phase_tokens, _ in RATES
        if phase(**settings).lr_decay == decay and settings.get("lr_end", 1.0) != 1.0
        if run_tokens >= OPTIMIZER.warmup_tokens and 0 < phase_tokens < 1000
    ]
    assert middle, "add a row to RATES"
    assert f"`{decay}`" in (ROOT / "docs" / "recipe.md").read_text()
