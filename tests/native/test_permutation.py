"""The keyed permutation: one to one, invertible, equal to the reference."""

import random

import numpy as np
import pytest

from megatron_ettin import native
from tests.native import reference


def test_every_small_n_is_a_bijection() -> None:
    for n in range(1, 5001):
        index = np.arange(n)
        values = native.permute(n, 1000 + n, index)
        assert np.bincount(values, minlength=n).tolist() == [1] * n, n
        np.testing.assert_array_equal(native.unpermute(n, 1000 + n, values), index)


@pytest.mark.parametrize("n", [65_535, 65_536, 65_537, 100_003, 131_071, 131_072, 131_073, 300_000])
def test_larger_n_is_a_bijection(n: int) -> None:
    index = np.arange(n)
    values = native.permute(n, n, index)
    assert values.min() == 0
    assert values.max() == n - 1
    assert np.unique(values).size == n
    np.testing.assert_array_equal(native.unpermute(n, n, values), index)


@pytest.mark.parametrize("exponent", [*range(16, 41), 50, 62])
def test_inverse_around_powers_of_two(exponent: int) -> None:
    chance = random.Random(exponent)
    for n in {2**exponent - 1, 2**exponent, min(2**exponent + 1, 2**62)}:
        index = np.array([0, 1, n - 2, n - 1, *(chance.randrange(n) for _ in range(500))])
        for key in (0, chance.getrandbits(64)):
            values = native.permute(n, key, index)
            assert 0 <= values.min() <= values.max() < n
            np.testing.assert_array_equal(native.unpermute(n, key, values), index)
            # The inverse alone may not be the forward map run twice.
            np.testing.assert_array_equal(
                native.permute(n, key, native.unpermute(n, key, index)), index
            )


def test_table_equals_the_reference() -> None:
    for n in (1, 2, 3, 7, 64, 1000, 65_536):
        values = native.permute(n, 12345 + n, np.arange(n))
        assert values.tolist() == reference.fisher_yates(n, 12345 + n)


def test_feistel_equals_the_reference() -> None:
    chance = random.Random(7)
    for n in (65_537, 99_991, 2**20, 2**20 + 1, 1_950_000_000, 2**40 - 1, 2**62):
        key = chance.getrandbits(64)
        index = [0, n - 1, *(chance.randrange(n) for _ in range(50))]
        expected = [reference.permute(n, key, i) for i in index]
        assert native.permute(n, key, np.array(index)).tolist() == expected


@pytest.mark.parametrize("index", [-1, 10])
def test_index_outside_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match=f"index {index} of a permutation of 10"):
        native.permute(10, 1, np.array([index]))


@pytest.mark.parametrize("n", [0, 2**62 + 1])
def test_size_outside_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"n = {n}"):
        native.permute(n, 1, np.array([0]))


def test_fractional_index_is_refused() -> None:
    with pytest.raises(TypeError):
        native.permute(10, 1, np.array([0.5]))
