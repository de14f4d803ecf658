"""Dropout: equal to the reference, a function of (seed, layer, g, element) alone, at its rate."""

from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_ettin import native
from tests.native import reference


def factors(
    g: list[int],
    *,
    seq_length: int = 5,
    channels: int = 7,
    seed: int = 3,
    layer: int = 2,
    rate: float = 0.1,
) -> NDArray[np.float32]:
    flat = native.dropout_factors(
        np.array(g, np.int64),
        seq_length=seq_length,
        channels=channels,
        seed=seed,
        layer=layer,
        rate=rate,
    )
    return flat.reshape(len(g), seq_length, channels)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1 / 3, 0.999999])
@pytest.mark.parametrize("channels", [1, 7, 8])
def test_factors_equal_the_reference(rate: float, channels: int) -> None:
    g = [0, 9, 2**40]
    got = factors(g, channels=channels, rate=rate)
    for row, number in zip(got, g, strict=True):
        expected = reference.dropout_row(
            number, seed=3, layer=2, seq_length=5, channels=channels, rate=rate
        )
        assert row.ravel().tolist() == [float(np.float32(float(x))) for x in expected]


def test_rows_do_not_depend_on_their_neighbours_but_on_seed_and_layer() -> None:
    together = factors([4, 5, 6])
    assert np.array_equal(factors([5])[0], together[1])
    assert not np.array_equal(together[0], together[1])
    assert not np.array_equal(factors([5], layer=3)[0], together[1])
    assert not np.array_equal(factors([5], seed=4)[0], together[1])


def test_an_idle_row_is_left_alone() -> None:
    assert (factors([-1, 3], rate=0.9)[0] == 1).all()


@pytest.mark.parametrize("channels", [1, 7, 8])
def test_a_range_of_slots_is_that_part_of_the_stream(channels: int) -> None:
    part = partial(
        native.dropout_factors,
        np.array([4, -1, 6], np.int64),
        seq_length=5,
        channels=channels,
        seed=3,
        layer=2,
        rate=0.5,
    )
    whole = part()
    for first in range(16):
        rest = whole[first * channels :]
        assert np.array_equal(part(first_slot=first), rest)
        for count in range(16 - first):
            got = part(first_slot=first, num_slots=count)
            assert np.array_equal(got, rest[: count * channels])


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (11, None), (11, 0), (3, 8), (3, -1)])
def test_slots_outside_of_the_stream_are_refused(first: int, count: int | None) -> None:
    with pytest.raises(ValueError, match=f"first_slot = {first} .* stream of 10 slots"):
        native.dropout_factors(
            np.array([1, 2], np.int64),
            seq_length=5,
            channels=7,
            seed=3,
            layer=2,
            rate=0.1,
            first_slot=first,
            num_slots=count,
        )


def test_the_share_and_the_mean_lie_within_binomial_bounds() -> None:
    got = factors(list(range(64)), seq_length=64, channels=64)
    n, p = got.size, 6554 / 65536
    deviation = (n * p * (1 - p)) ** 0.5
    assert abs(int((got == 0).sum()) - n * p) < 4 * deviation
    assert abs(float(got.mean(dtype=np.float64)) - 1) < 4 * deviation / n / (1 - p)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"rate": 1.0}, "rate"), ({"channels": 0}, "channels"), ({"layer": -1}, "layer")],
)
def test_a_bad_rule_is_named(change: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        factors([1], **change)  # type: ignore[arg-type]
