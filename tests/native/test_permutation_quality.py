"""The permutation mixes like a shuffle: numpy's passes the same statistics, weaker networks fail.

Every statistic is a z-score: about standard normal for a true shuffle. All keys are fixed, so a
test that passes once always passes. Chance exceeds Z_LIMIT about once in 10^6 statistics (for chi^2
of 1,000 degrees or more, which is nearly normal), and the longest runs here take some 10^4.
"""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_ettin import native
from tests.native import reference

Z_LIMIT = 5.0
BATCH, REGIONS, DIFFERENCE_BINS = 4608, 64, 1024
MODERNBERT_ROWS = 1_950_000_000  # of 2T tokens at 1,024 tokens a row
Integers = NDArray[np.int64]


def values_of(n: int, seed: int, first: int = 0, count: int | None = None) -> Integers:
    index = np.arange(first, n if count is None else first + count)
    return native.permute(n, native.permutation_key(seed, 0, 0), index)


def shuffle(n: int, seed: int) -> Integers:
    return np.random.default_rng(seed).permutation(n)


def half(n: int) -> int:
    """Return s: indices that are 2^s apart enter the first round with the same right half."""
    return (n - 1).bit_length() // 2


# Statistics


def contingency_z(row: Integers, column: Integers) -> float:
    """Chi^2 of independence between two labels per element, given both margins."""
    rows, columns = int(row.max()) + 1, int(column.max()) + 1
    table = np.bincount(row * columns + column, minlength=rows * columns).reshape(rows, columns)
    expected = np.outer(table.sum(1), table.sum(0)) / len(row)
    return chi_squared_z(table, expected, (rows - 1) * (columns - 1))


def chi_squared_z(observed: Integers, expected: NDArray[np.float64], degrees: int) -> float:
    chi_squared = float(((observed - expected) ** 2 / expected).sum())
    return (chi_squared - degrees) / math.sqrt(2 * degrees)


def difference_z(difference: Integers, n: int) -> float:
    """Chi^2 of differences modulo n over bins whose sizes are equal or differ by one value."""
    counts = np.bincount(difference % n * DIFFERENCE_BINS // n, minlength=DIFFERENCE_BINS)
    expected = np.full(DIFFERENCE_BINS, len(difference) / DIFFERENCE_BINS)
    return chi_squared_z(counts, expected, DIFFERENCE_BINS - 1)


def repeat_z(difference: Integers, n: int) -> float:
    """Pairs of equal differences: nearly independent events with probability 1 / n each."""
    ordered = np.sort(difference % n)
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    counts = np.diff(starts, append=len(ordered))
    expected = math.comb(len(ordered), 2) / n
    return (float((counts * (counts - 1) // 2).sum()) - expected) / math.sqrt(expected)


def statistics(values: Integers, n: int, strides: list[int]) -> dict[str, float]:
    """Return z-scores of the first len(values) places of a permutation, or of a window of it."""
    place = np.arange(len(values))
    region = values * REGIONS // n
    scores = {
        "place and region": contingency_z(place * REGIONS // len(values), region),
        "batch and region": contingency_z(place // BATCH, region),
        "regions of neighbours": contingency_z(region[:-1], region[1:]),
    }
    if len(values) < n:  # else every region is full
        scores["regions"] = difference_z(values, n)
    for k in strides:
        difference = values[2**k :] - values[: -(2**k)]
        scores[f"differences at 2^{k}"] = difference_z(difference, n)
    for k in {0, half(n)} & set(strides):
        difference = values[2**k :] - values[: -(2**k)]
        scores[f"equal differences at 2^{k}"] = repeat_z(difference, n)
    return scores


Scores = list[dict[str, float]]


def outliers(ours: Scores, theirs: Scores) -> list[str]:
    """Name what is no shuffle: a z-score by itself, a true shuffle's included, or the mean over
    keys, where a small bias would add up.
    """
    found = []
    for name in ours[0]:
        mine, others = (np.array([scores[name] for scores in part]) for part in (ours, theirs))
        for whose, scores in (("a shuffle", others), ("the permutation", mine)):
            if not np.abs(scores).max() < Z_LIMIT:
                found.append(f"{name} of {whose}: {scores}")
        error = math.sqrt(1 / len(mine) + 1 / len(others))
        if not abs(mine.mean() - others.mean()) < Z_LIMIT * error:
            found.append(f"mean {name}: {mine}, of shuffles {others}")
    return found


# Whole permutations and windows


def outliers_of_whole(n: int, keys: int, strides: list[int]) -> list[str]:
    return outliers(
        [statistics(values_of(n, seed), n, strides) for seed in range(keys)],
        [statistics(shuffle(n, seed), n, strides) for seed in range(keys)],
    )


@pytest.mark.parametrize("n", [65_537, 1_000_000])
def test_a_permutation_is_like_a_shuffle(n: int) -> None:
    assert outliers_of_whole(n, 2, [0, half(n)]) == []


@pytest.mark.long
@pytest.mark.parametrize("n", [65_537, 200_003, 1_000_000, 2**20, 2**20 + 1])
def test_many_permutations_are_like_shuffles(n: int) -> None:
    assert outliers_of_whole(n, 32, list(range(half(n) * 2 - 1))) == []


def outliers_of_window(first: int, count: int, keys: int, strides: list[int]) -> list[str]:
    """Among 1.95e9 values, a window of a shuffle is nearly a sample of independent ones."""
    n = MODERNBERT_ROWS
    return outliers(
        [statistics(values_of(n, seed, first, count), n, strides) for seed in range(keys)],
        [
            statistics(np.random.default_rng(seed).integers(0, n, count), n, strides)
            for seed in range(keys)
        ],
    )


def test_a_window_of_a_large_permutation_is_like_a_sample() -> None:
    strides = [0, half(MODERNBERT_ROWS)]
    assert outliers_of_window(MODERNBERT_ROWS // 2, 2**18, 2, strides) == []


@pytest.mark.long
@pytest.mark.parametrize("first", [0, MODERNBERT_ROWS // 2, MODERNBERT_ROWS - 2**20])
def test_many_windows_are_like_samples(first: int) -> None:
    assert outliers_of_window(first, 2**20, 32, list(range(20))) == []


# Rare events, counted over many keys: sums of Poisson counts of mean 1


def check_poisson(count: int, mean: int) -> None:
    assert abs(count - mean) < Z_LIMIT * math.sqrt(mean), (count, mean)


def count_fixed_points(n: int, keys: int) -> int:
    index = np.arange(n)
    return sum(int((values_of(n, seed) == index).sum()) for seed in range(keys))


def compare_neighbours(n: int, keys: int) -> None:
    """Neighbouring seeds, sources and epochs have unrelated permutations."""
    index = np.arange(n)
    for part in range(3):
        words = [[7, 7, 7] for _ in range(keys + 1)]
        for step, word in enumerate(words):
            word[part] += step
        values = [native.permute(n, native.permutation_key(*word), index) for word in words]
        pairs = list(zip(values[1:], values[:-1], strict=True))
        check_poisson(sum(int((one == other).sum()) for one, other in pairs), keys)
        scores = np.array([difference_z(one - other, n) for one, other in pairs])
        assert np.abs(scores).max() < Z_LIMIT
        assert abs(scores.mean()) < Z_LIMIT / math.sqrt(keys)


def test_fixed_points_and_neighbouring_keys() -> None:
    check_poisson(count_fixed_points(65_537, 32), 32)
    compare_neighbours(65_537, 16)


@pytest.mark.long
@pytest.mark.parametrize("n", [65_537, 1_000_000, 2**20, 2**20 + 1])
def test_many_fixed_points_and_neighbouring_keys(n: int) -> None:
    check_poisson(count_fixed_points(n, 256), 256)
    compare_neighbours(n, 64)


@pytest.mark.parametrize("keys", [6_000, pytest.param(600_000, marks=pytest.mark.long)])
def test_tables_take_every_order_equally_often(keys: int) -> None:
    places = np.arange(5)
    powers = 5**places
    codes = np.array([native.permute(5, key, places) @ powers for key in range(keys)])
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == math.factorial(5)
    assert abs(chi_squared_z(counts, np.full(120, keys / 120), 119)) < Z_LIMIT


# The statistics can fail: the same network with fewer rounds


def multiply(a: NDArray[np.uint64], b: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the low and the high word of a 128-bit product."""
    low, b_low, b_high = np.uint64(0xFFFFFFFF), np.uint64(b % 2**32), np.uint64(b >> 32)
    shift = np.uint64(32)
    middle = (a >> shift) * b_low + ((a & low) * b_low >> shift)
    carry = (a & low) * b_high + (middle & low)
    return a * np.uint64(b), (a >> shift) * b_high + (middle >> shift) + (carry >> shift)


def network(n: int, key: int, index: Integers, rounds: int) -> Integers:
    """docs/order.md, section 2, for arrays and any number of rounds."""
    s = half(n)
    sizes = (-(-n // 2**s), 2**s)
    x = index.astype(np.uint64)
    left, right = x >> np.uint64(s), x & np.uint64(2**s - 1)
    for r in range(rounds):
        mixed = right ^ np.uint64(reference.draw(key, r))
        for constant in (0x6A09E667F3BCC909, 0xBB67AE8584CAA73B):
            low, high = multiply(mixed, constant)
            mixed = low ^ high
        _, added = multiply(mixed, sizes[r % 2])
        # The halves change places, so that one expression serves both kinds of rounds.
        left, right = right, (left + added) % np.uint64(sizes[r % 2])
    if rounds % 2:
        left, right = right, left
    values = (left * np.uint64(2**s) + right).astype(np.int64)
    outside = np.flatnonzero(values >= n)
    if len(outside):
        values[outside] = network(n, key, values[outside], rounds)
    return values


@pytest.mark.parametrize("n", [65_537, 1_000_003, MODERNBERT_ROWS])
def test_the_network_of_eight_rounds_is_the_permutation(n: int) -> None:
    index = np.arange(n - 20_000, n)
    key = native.permutation_key(3, 0, 0)
    np.testing.assert_array_equal(network(n, key, index, 8), values_of(n, 3, n - 20_000, 20_000))


@pytest.mark.parametrize(
    ("n", "count", "rounds", "statistic"),
    [
        (1_000_000, 1_000_000, 4, "differences at 2^10"),
        (MODERNBERT_ROWS, 2**18, 3, "equal differences at 2^15"),
    ],
)
def test_a_network_of_fewer_rounds_fails(n: int, count: int, rounds: int, statistic: str) -> None:
    values = network(n, native.permutation_key(0, 0, 0), np.arange(count), rounds)
    assert statistics(values, n, [0, half(n)])[statistic] > 1.5 * Z_LIMIT
