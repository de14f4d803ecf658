"""The measure of a spike, and the settings that decide."""

import math
import statistics

import numpy as np
import pytest

from megatron_ettin.config import TroubleConfig
from megatron_ettin.training.trouble import robust_z


def test_the_z_score_of_normal_losses_is_in_standard_deviations() -> None:
    losses = np.random.default_rng(3).normal(5.0, 0.25, 100_001).tolist()
    z = robust_z(losses, 5.0 + 4 * 0.25)
    assert z == pytest.approx(4.0, rel=0.02)


def test_outliers_do_not_hide_a_spike() -> None:
    losses = [3.0, 3.1, 2.9, 3.05, 2.95, 90.0, 80.0, 3.0, 2.98]
    middle = statistics.median(losses)
    spread = 1.4826 * statistics.median(abs(loss - middle) for loss in losses)
    assert robust_z(losses, 4.0) == pytest.approx((4.0 - middle) / spread)
    assert robust_z(losses, 2.0) == pytest.approx(-(middle - 2.0) / spread)


def test_equal_losses_have_no_score() -> None:
    assert robust_z([2.0] * 8 + [3.0] * 7, 50.0) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spike_z", 0.0),
        ("spike_z", math.nan),
        ("window_steps", 7),
        ("rewind_steps", 0),
        ("max_interventions", -1),
    ],
)
def test_settings_that_mean_nothing_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^trouble\.{field}: "):
        TroubleConfig(**{field: value})  # type: ignore[arg-type]


def test_only_settings_that_ask_for_it_look_at_every_step() -> None:
    assert not TroubleConfig().is_on
    assert TroubleConfig(on_nan="skip").is_on
    assert TroubleConfig(on_spike="stop").is_on
