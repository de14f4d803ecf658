"""Masks: equal to the reference, functions of (seed, g, position) alone, with the right rates."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_ettin import native
from tests.native import reference

MASK, VOCAB = 7, 50_000
SPECIAL = [3, 4, 5, 6, MASK]
RULES: dict[str, Any] = {
    "mask_seed": 21,
    "mask_rate": 0.3,
    "mask_id": MASK,
    "vocab_size": VOCAB,
    "special_ids": SPECIAL,
}


def mask(
    tokens: NDArray[np.int64], g: list[int], **change: object
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    rules: dict[str, Any] = {**RULES, **change}
    return native.mask_tokens(
        tokens, np.array(g, np.int64), seq_length=tokens.size // max(1, len(g)), **rules
    )


def test_masks_equal_the_reference() -> None:
    rng = np.random.default_rng(0)
    g = [0, 1, 5, 2**40, -1, 2**62]
    tokens = rng.integers(0, 12, (len(g), 300))  # many special tokens
    for rate in (0.0, 1 / 3, 0.15, 1.0):
        masked, selected = mask(tokens.ravel(), g, mask_rate=rate)
        for i, number in enumerate(g):
            expected = reference.mask_row(
                tokens[i].tolist(),
                number,
                mask_seed=21,
                mask_rate=rate,
                mask_id=MASK,
                vocab_size=VOCAB,
                special_ids=SPECIAL,
            )
            assert masked.reshape(tokens.shape)[i].tolist() == expected[0]
            assert selected.reshape(tokens.shape)[i].tolist() == expected[1]


def test_rates_lie_within_binomial_bounds() -> None:
    rows, length = 1000, 512
    tokens = np.random.default_rng(1).integers(8, VOCAB, rows * length)
    masked, selected = mask(tokens, list(range(rows)))
    chosen = int(selected.sum())

    def assert_share(count: int, total: int, share: float) -> None:
        deviation = (total * share * (1 - share)) ** 0.5
        assert abs(count - total * share) < 4 * deviation, (count, total, share)

    assert_share(chosen, tokens.size, 0.3)
    is_mask = masked[selected] == MASK
    is_kept = masked[selected] == tokens[selected]
    assert_share(int(is_mask.sum()), chosen, 0.8 + 0.1 / VOCAB)
    assert_share(int(is_kept.sum()), chosen, 0.1 + 0.1 / VOCAB)
    replaced = masked[selected][~is_mask & ~is_kept]
    assert_share(replaced.size, chosen, 0.1 - 0.2 / VOCAB)
    assert_share(int((replaced < VOCAB // 2).sum()), replaced.size, 0.5)
    assert (replaced.min(), replaced.max()) >= (0, 0)
    assert replaced.max() < VOCAB
    # Every position of a row and every row is masked alike.
    by_position = selected.reshape(rows, length).sum(axis=0)
    assert np.abs(by_position - 300).max() < 5 * (rows * 0.21) ** 0.5
    by_row = selected.reshape(rows, length).sum(axis=1)
    assert np.abs(by_row - 153.6).max() < 5 * (length * 0.21) ** 0.5
    np.testing.assert_array_equal(masked[~selected], tokens[~selected])


def row_with_first_draw(seed: int, low: int) -> int:
    """Return a row number g whose first draw is one of the least words >= low."""
    seeded = reference.counter_key(seed, reference.MASK, [])
    for value in range(low, low + 200):
        key = (reference.unmix64(value) - reference.GAMMA) % reference.WORD
        g = (reference.unmix64(key) - reference.GAMMA) % reference.WORD ^ seeded
        if g < 2**63:
            assert reference.draw(reference.counter_key(seed, reference.MASK, [g]), 0) == value
            return g
    raise AssertionError("half of all words are below 2^63")


def test_the_rate_is_compared_exactly() -> None:
    threshold = Fraction(0.3) * 2**53
    assert threshold.denominator == 2  # 0.3 falls between two 53-bit draws
    below = threshold.numerator // 2
    for draw, is_selected in ((below, True), (below + 1, False)):
        g = row_with_first_draw(21, draw << 11)
        assert mask(np.array([100]), [g], mask_rate=0.3)[1].tolist() == [is_selected]


def test_special_tokens_are_never_selected() -> None:
    tokens = np.tile(np.array([3, 100, 4, 5, 6, 7]), 200)
    masked, selected = mask(tokens, [9], mask_rate=1.0)
    np.testing.assert_array_equal(selected, tokens == 100)
    np.testing.assert_array_equal(masked[~selected], tokens[~selected])


def test_a_mask_depends_on_seed_g_and_position_alone() -> None:
    rng = np.random.default_rng(2)
    tokens, others = rng.integers(8, VOCAB, (2, 4, 100))
    masked, selected = mask(tokens.ravel(), [10, 11, 12, 13])
    alone_masked, alone_selected = mask(tokens[2], [12])
    np.testing.assert_array_equal(masked.reshape(4, 100)[2], alone_masked)
    np.testing.assert_array_equal(selected.reshape(4, 100)[2], alone_selected)
    np.testing.assert_array_equal(mask(others.ravel(), [10, 11, 12, 13])[1], selected)
    assert (mask(tokens.ravel(), [10, 11, 12, 13], mask_seed=22)[1] != selected).any()
    assert (mask(tokens[2], [11])[1] != alone_selected).any()


def test_a_higher_rate_selects_a_superset() -> None:
    tokens = np.random.default_rng(3).integers(8, VOCAB, 2000)
    low, high = (mask(tokens, [5], mask_rate=rate)[1] for rate in (0.15, 0.3))
    assert (high | ~low).all()
    assert high.sum() > low.sum()


def test_idle_rows_and_the_input_stay_as_they_are() -> None:
    tokens = np.random.default_rng(4).integers(8, VOCAB, 200)
    before = tokens.copy()
    masked, selected = mask(tokens, [-1, 6])
    np.testing.assert_array_equal(masked[:100], before[:100])
    assert not selected[:100].any()
    assert selected[100:].any()
    np.testing.assert_array_equal(tokens, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_rate": 1.5}, "mask_rate is 1.5"),
        ({"mask_rate": -0.1}, "mask_rate is -0.1"),
        ({"mask_rate": float("nan")}, "mask_rate is nan"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_bad_rule_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask(np.arange(8), [0], **change)


def test_size_must_match() -> None:
    with pytest.raises(ValueError, match="tokens has 9 values, expected 8"):
        native.mask_tokens(np.arange(9), np.array([0]), seq_length=8, **RULES)
