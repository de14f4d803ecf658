"""Quotas of a blend, from weights."""

import random
from fractions import Fraction

import pytest

from megatron_ettin.order.blend import BLEND_PERIOD, blend_quotas


def test_quotas_sum_to_the_period_and_round_by_less_than_one() -> None:
    chance = random.Random(11)
    for _ in range(200):
        weights = [chance.uniform(0.01, 10.0) for _ in range(chance.randrange(1, 30))]
        quotas = blend_quotas(weights)
        assert sum(quotas) == BLEND_PERIOD
        total = sum(map(Fraction, weights))
        for weight, quota in zip(weights, quotas, strict=True):
            assert abs(quota - Fraction(weight) / total * BLEND_PERIOD) < 1


def test_largest_remainders_are_rounded_up_and_ties_go_first() -> None:
    assert blend_quotas([1, 1, 1], 4) == [2, 1, 1]
    assert blend_quotas([10, 13, 9], 8) == [3, 3, 2]  # 2.5, 3.25, 2.25
    assert blend_quotas([1, 3], 4) == [1, 3]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_weight_is_named(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weights\[1\] is"):
        blend_quotas([1.0, weight])


def test_tiny_share_is_named() -> None:
    with pytest.raises(ValueError, match=r"weights\[2\] = 1e-06 .* smallest share 1/65536"):
        blend_quotas([0.5, 0.5, 1e-6])


def test_empty_blend_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one weight"):
        blend_quotas([])
