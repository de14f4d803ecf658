"""Learning rates at chosen token counts, against values worked out by hand."""

import math

import pytest

from megatron_ettin.config import OptimizerConfig, PhaseConfig
from megatron_ettin.training.optimizer import learning_rate

OPTIMIZER = OptimizerConfig(lr=0.01, weight_decay=0.0, warmup_tokens=100)


def phase(**settings: object) -> PhaseConfig:
    fields = {"name": "p", "train_tokens": 1000, "seq_length": 8, "global_batch_size": 1}
    return PhaseConfig(**{**fields, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "run_tokens", "phase_tokens", "expected"),
    [
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
    ],
)
def test_rate(
    settings: dict[str, object], run_tokens: int, phase_tokens: int, expected: float
) -> None:
    rate = learning_rate(
        OPTIMIZER, phase(**settings), run_tokens=run_tokens, phase_tokens=phase_tokens
    )
    assert rate == pytest.approx(expected, rel=1e-12, abs=1e-15)
