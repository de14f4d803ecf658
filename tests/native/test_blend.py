"""Quotas from weights, the blend table, and how close it stays to the weights."""

import random
from fractions import Fraction

import numpy as np
import pytest

from megatron_ettin import native
from tests.native import reference


def random_quotas(chance: random.Random, sources: int, period: int) -> list[int]:
    cuts = sorted(chance.sample(range(1, period), sources - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, period], strict=True)]


def test_table_equals_the_reference() -> None:
    chance = random.Random(3)
    for sources, period in [(1, 1), (1, 64), (2, 2), (3, 1024), (7, 512), (64, 64), (40, 4096)]:
        quotas = random_quotas(chance, sources, period)
        source, rank = native.blend_table(quotas)
        assert (source.tolist(), rank.tolist()) == reference.blend_table(quotas)


def test_whole_table_realises_the_weights() -> None:
    weights = [0.5, 0.3, 0.1, 0.05, 0.03, 0.0199, 0.0001]
    quotas = native.blend_quotas(weights)
    source, rank = native.blend_table(quotas)
    assert source.size == native.BLEND_PERIOD
    assert np.bincount(source).tolist() == quotas
    for s, quota in enumerate(quotas):
        assert rank[source == s].tolist() == list(range(quota))
        prefix = np.cumsum(source == s)
        exact = quota * np.arange(1, source.size + 1) / source.size
        assert np.abs(prefix - exact).max() < 1.0 + 1e-9, f"source {s} strays from its share"


def test_quotas_sum_to_the_period_and_round_by_less_than_one() -> None:
    chance = random.Random(11)
    for _ in range(200):
        weights = [chance.uniform(0.01, 10.0) for _ in range(chance.randrange(1, 30))]
        quotas = native.blend_quotas(weights)
        assert sum(quotas) == native.BLEND_PERIOD
        total = sum(map(Fraction, weights))
        for weight, quota in zip(weights, quotas, strict=True):
            assert abs(quota - Fraction(weight) / total * native.BLEND_PERIOD) < 1


def test_largest_remainders_are_rounded_up_and_ties_go_first() -> None:
    assert native.blend_quotas([1, 1, 1], 4) == [2, 1, 1]
    assert native.blend_quotas([10, 13, 9], 8) == [3, 3, 2]  # 2.5, 3.25, 2.25
    assert native.blend_quotas([1, 3], 4) == [1, 3]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_weight_is_named(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weights\[1\] is"):
        native.blend_quotas([1.0, weight])


def test_tiny_share_is_named() -> None:
    with pytest.raises(ValueError, match=r"weights\[2\] = 1e-06 .* smallest share 1/65536"):
        native.blend_quotas([0.5, 0.5, 1e-6])


def test_empty_blend_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one weight"):
        native.blend_quotas([])


@pytest.mark.parametrize(
    ("quotas", "message"),
    [
        ([], "sum to 0"),
        ([3, 0, 1], r"quotas\[1\] is 0"),
        ([3, -1, 2], r"quotas\[1\] is -1"),
        ([3, 2], "power of two"),
        ([2**20, 2**20], "or more"),
    ],
)
def test_impossible_quotas_are_refused(quotas: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.blend_table(quotas)
