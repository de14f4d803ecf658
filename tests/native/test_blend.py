"""The blend table, and how close it stays to the weights."""

import random

import numpy as np
import pytest

from megatron_ettin import native
from megatron_ettin.order.blend import BLEND_PERIOD, blend_quotas
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
    quotas = blend_quotas(weights)
    source, rank = native.blend_table(quotas)
    assert source.size == BLEND_PERIOD
    assert np.bincount(source).tolist() == quotas
    for s, quota in enumerate(quotas):
        assert rank[source == s].tolist() == list(range(quota))
        prefix = np.cumsum(source == s)
        exact = quota * np.arange(1, source.size + 1) / source.size
        assert np.abs(prefix - exact).max() < 1.0 + 1e-9, f"source {s} strays from its share"


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
