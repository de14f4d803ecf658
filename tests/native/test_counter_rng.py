"""Counters: keys and draws against the reference over random and extreme words."""

import random
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin import native
from tests.native import reference

ROOT = Path(__file__).parents[2]
EXTREMES = [0, 1, 2**32, 2**63, 2**64 - 1]


def test_keys_and_draws_equal_the_reference() -> None:
    chance = random.Random(1)
    words = [*EXTREMES, *(chance.getrandbits(64) for _ in range(40))]
    for _ in range(200):
        seed, purpose, first = chance.choice(words), chance.randrange(8), chance.getrandbits(40)
        counters = [chance.choice(words) for _ in range(chance.randrange(5))]
        key = native.counter_key(seed, purpose, counters)
        assert key == reference.counter_key(seed, purpose, counters)
        expected = [reference.draw(key, first + i) for i in range(5)]
        assert native.counter_draws(key, first, 5).tolist() == expected


def test_draws_do_not_depend_on_where_a_range_begins() -> None:
    whole = native.counter_draws(99, 0, 1000)
    np.testing.assert_array_equal(native.counter_draws(99, 300, 50), whole[300:350])


def test_purposes_are_those_of_the_specification_and_of_the_extension() -> None:
    purposes = [(purpose.value, purpose.name) for purpose in native.Purpose]
    table = re.findall(
        r"^\| (\d+) \| `(\w+)` \|", (ROOT / "docs/order.md").read_text(), re.MULTILINE
    )
    assert [(int(number), name) for number, name in table] == purposes
    header = (ROOT / "csrc/counter_rng.h").read_text()
    constants = re.findall(r"^  k(\w+) = (\d+),$", header, re.MULTILINE)
    assert [
        (int(number), re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()) for name, number in constants
    ] == purposes


def test_permutation_key_is_a_counter_key() -> None:
    key = native.counter_key(5, reference.PERMUTATION, [6, 7])
    assert native.permutation_key(5, 6, 7) == key


def test_bits_are_balanced() -> None:
    bits = np.unpackbits(native.counter_draws(3, 0, 100_000).view(np.uint8)).reshape(-1, 64)
    # 64 binomial counts with standard deviation 158: none as far as 5 of them from the middle.
    assert np.abs(bits.sum(axis=0, dtype=np.int64) - 50_000).max() < 5 * 158


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_outside_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(TypeError):
        native.counter_key(seed, 1, [])


def test_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="count must be >= 0"):
        native.counter_draws(1, 0, -1)
