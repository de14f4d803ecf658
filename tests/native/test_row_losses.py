"""Entries of row losses are split as numpy reads them, or said to have other rows among them."""

import numpy as np
import pytest

from megatron_ettin import native

TRAINED = 1 << 30
NAN, INFINITY = 0x7FC00000, 0xFF800000


def entries(sums: np.ndarray, words: np.ndarray) -> np.ndarray:
    return np.stack([sums.view("<u4"), words], axis=1).ravel().view("<u8")


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_rows_that_were_trained_on_are_split(count: int) -> None:
    random = np.random.default_rng(count)
    sums = random.normal(size=count).astype("<f4") * np.float32(1e30)
    tokens = random.integers(1, TRAINED, count).astype("<u4")
    tokens[: count // 2] %= 9
    tokens += tokens == 0
    found, of_rows, are_trained = native.split_trained_losses(entries(sums, tokens + TRAINED))
    assert are_trained
    assert found.dtype == np.float32
    assert found.tobytes() == sums.tobytes()
    assert of_rows.tolist() == tokens.tolist()


@pytest.mark.parametrize(
    ("bits", "word"),
    [
        (0, 0),  # nothing is on record
        (0, TRAINED),  # no token
        (NAN, 2 * TRAINED),  # left out
        (0, 2 * TRAINED + 1),
        (0, 3 * TRAINED + 5),
        (0, 5),
        (NAN, TRAINED + 5),
        (NAN | 1 << 31, TRAINED + 5),
        (INFINITY, TRAINED + 5),
    ],
)
@pytest.mark.parametrize("place", [0, 16, 18])
def test_one_other_row_is_noticed(bits: int, word: int, place: int) -> None:
    sums, words = np.ones(19, "<f4"), np.full(19, TRAINED + 1, "<u4")
    assert native.split_trained_losses(entries(sums, words))[2]
    sums.view("<u4")[place], words[place] = bits, word
    assert not native.split_trained_losses(entries(sums, words))[2]
    places, are_trained = native.find_losses_above(
        entries(sums, words), np.full(19, 2.0, np.float32)
    )
    assert not are_trained
    assert set(places.tolist()) <= {place}


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_rows_above_their_limits_are_those_that_numpy_finds(count: int, share: float) -> None:
    random = np.random.default_rng(count)
    sums = random.normal(size=count).astype("<f4") * np.float32(100)
    tokens = random.integers(1, 100, count).astype("<u4")
    # Some are equal to their limits, and not above.
    limits = (sums / tokens.astype("<f4")).astype(np.float32)
    limits += (random.random(count) >= share).astype(np.float32)
    limits -= (random.random(count) < share / 2).astype(np.float32)
    places, are_trained = native.find_losses_above(entries(sums, tokens + TRAINED), limits)
    assert are_trained
    assert places.tolist() == np.flatnonzero(sums > tokens.astype("<f4") * limits).tolist()
    assert share < 1 or count < 63 or len(places)


def test_the_largest_values_are_of_the_rule() -> None:
    sums = np.array([np.finfo("<f4").max, -np.finfo("<f4").max, 0.0], "<f4")
    words = np.array([TRAINED + 1, 2 * TRAINED - 1, TRAINED + 1], "<u4")
    assert native.split_trained_losses(entries(sums, words))[2]


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="entries must be a 1-D array"):
        native.split_trained_losses(np.zeros((2, 2), np.uint64))
    with pytest.raises(ValueError, match="limits has 1 values, expected 2"):
        native.find_losses_above(np.zeros(2, np.uint64), np.zeros(1, np.float32))
