"""Initial weights: the right distribution, by name and element alone."""

import numpy as np
import pytest
from scipy import special, stats

from megatron_ettin import native
from tests.native import reference

NAME = "model.layers.3.mlp.Wi.weight"


@pytest.mark.parametrize("cutoff", [0.5, 2.0, 3.0, 7.0])
def test_truncated_normal_equals_scipys_quantile(cutoff: float) -> None:
    weights = native.initial_weights(NAME, 11, 0, 5000, std=0.02, cutoff_std=cutoff)
    u = reference.uniforms(NAME, 11, reference.NORMAL_WEIGHTS, 0, 5000)
    expected = special.ndtri(0.5 + (u - 0.5) * special.erf(cutoff / 2**0.5)) * 0.02
    np.testing.assert_allclose(weights, expected.astype(np.float32), rtol=3e-7, atol=1e-12)


def test_uniform_equals_the_reference() -> None:
    weights = native.uniform_weights("decoder.bias", 11, 100, 2000, -0.125, 0.5)
    u = reference.uniforms("decoder.bias", 11, reference.UNIFORM_WEIGHTS, 100, 2000)
    np.testing.assert_array_equal(weights, (-0.125 + u * 0.625).astype(np.float32))


def test_distribution_is_a_truncated_normal() -> None:
    weights = native.initial_weights(NAME, 4, 0, 100_000, std=0.02)
    assert weights.dtype == np.float32
    assert np.abs(weights).max() <= np.float32(0.04)
    fit = stats.kstest(weights, stats.truncnorm(-2, 2, scale=0.02).cdf)
    assert fit.pvalue > 0.01
    assert stats.kstest(weights, stats.truncnorm(-2, 2, scale=0.0202).cdf).pvalue < fit.pvalue
    # Neighbouring elements are independent: correlation within 4 standard deviations of 0.
    assert abs(np.corrcoef(weights[:-1], weights[1:])[0, 1]) < 4 / 100_000**0.5


def element_with_draw(key: int, low: int) -> int:
    """Return an element below 2^63 whose draw is one of the least words >= low."""
    for value in range(low, low + 200):
        steps = (reference.unmix64(value) - key) * pow(reference.GAMMA, -1, reference.WORD)
        element = steps % reference.WORD - 1
        if 0 <= element < 2**63 - 1:
            assert reference.draw(key, element) == value
            return element
    raise AssertionError("half of all words are below 2^63")


@pytest.mark.parametrize(
    "draw", [0, 1 << 20, 1 << 28, 1 << 36, (1 << 64) - (1 << 30), (1 << 64) - 256]
)
def test_extreme_draws_equal_scipys_quantile(draw: int) -> None:
    """The last branch of AS 241 needs draws that chance would bring once in 10^10."""
    key = reference.counter_key(0, reference.NORMAL_WEIGHTS, [reference.hash_name(NAME)])
    element = element_with_draw(key, draw)
    weight = native.initial_weights(NAME, 0, element, 1, std=1.0, cutoff_std=7.0)[0]
    u = reference.uniforms(NAME, 0, reference.NORMAL_WEIGHTS, element, 1)[0]
    q = (u - 0.5) * special.erf(7.0 / 2**0.5)
    expected = np.copysign(special.ndtri(0.5 - abs(q)), q)
    assert abs(expected) > 5
    assert weight == pytest.approx(expected, rel=3e-7)


def test_a_slice_equals_the_range_of_the_whole() -> None:
    whole = native.initial_weights(NAME, 1, 0, 1000, std=0.1)
    for begin, count in [(0, 10), (500, 1), (123, 877), (1000, 0)]:
        part = native.initial_weights(NAME, 1, begin, count, std=0.1)
        np.testing.assert_array_equal(part, whole[begin : begin + count])
    uniform = native.uniform_weights(NAME, 1, 0, 1000, 0.0, 1.0)
    np.testing.assert_array_equal(
        native.uniform_weights(NAME, 1, 40, 60, 0.0, 1.0), uniform[40:100]
    )


def test_name_and_seed_change_everything() -> None:
    one = native.initial_weights(NAME, 1, 0, 1000, std=0.1)
    for name, seed in [(NAME, 2), (NAME + "x", 1), ("", 1)]:
        other = native.initial_weights(name, seed, 0, 1000, std=0.1)
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.13  # 4 standard deviations


@pytest.mark.parametrize(
    ("begin", "count", "std", "cutoff", "message"),
    [
        (-1, 1, 0.1, 2.0, "begin and count must be >= 0"),
        (0, -1, 0.1, 2.0, "a count must be >= 0"),
        (0, 1, 0.0, 2.0, "std is 0"),
        (0, 1, float("nan"), 2.0, "std is nan"),
        (0, 1, 0.1, 0.0, "cutoff_std is 0"),
        (0, 1, 0.1, 7.5, "cutoff_std is 7.5"),
    ],
)
def test_bad_argument_is_named(
    begin: int, count: int, std: float, cutoff: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        native.initial_weights("p", 0, begin, count, std=std, cutoff_std=cutoff)


def test_bad_range_is_refused() -> None:
    with pytest.raises(ValueError, match="low <= high"):
        native.uniform_weights("p", 0, 0, 1, 1.0, 0.0)
    with pytest.raises(ValueError, match="begin and count must be >= 0"):
        native.uniform_weights("p", 0, -1, 1, 0.0, 1.0)
