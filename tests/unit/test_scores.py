"""Scores, their intervals and their differences, against formulas and slow resampling."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest
from scipy.stats import t as students_t
from sklearn.metrics import matthews_corrcoef

from megatron_ettin.evaluation.scores import NUM_RESAMPLES, ConfidenceInterval, Score, over_seeds


def score(rows: list[list[float]], metric: str = "accuracy", **fields: object) -> Score:
    items = tuple(f"item {number}" for number in range(len(rows[0])))
    return Score(metric=metric, items=items, predictions=np.array(rows, dtype=float), **fields)  # type: ignore[arg-type]


def answers(num_right: int, num_items: int) -> list[float]:
    return [1.0] * num_right + [0.0] * (num_items - num_right)


def test_a_share_has_the_binomial_error_and_interval() -> None:
    measured = score([answers(140, 200)])
    assert measured.value == pytest.approx(0.7)
    assert measured.standard_error == pytest.approx(math.sqrt(0.7 * 0.3 / 200), rel=0.05)
    exact = binomtest(140, 200).proportion_ci(0.95, method="wilson")
    assert measured.interval == pytest.approx((exact.low, exact.high), abs=0.01)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        low, high = score([rng.binomial(1, 0.6, 150).tolist()]).interval
        covered += low <= 0.6 <= high
    assert 180 <= covered <= 198


def test_a_difference_is_paired() -> None:
    rng = np.random.default_rng(4)
    easy = rng.binomial(1, 0.7, 300)
    better = np.where(rng.random(300) < 0.1, 1, easy)  # the same answers, some of them mended
    difference = score([better.tolist()]).minus(score([easy.tolist()]))
    assert difference.value == pytest.approx((better - easy).mean())
    pairs = (better - easy).std() / math.sqrt(300)
    width = difference.interval.high - difference.interval.low
    assert width == pytest.approx(2 * 1.96 * pairs, rel=0.1)
    # As two samples that are not paired, the same shares would not differ beyond their interval.
    unpaired = math.sqrt(sum(s.var() / 300 for s in (better, easy)))
    assert difference.interval.excludes_zero
    assert difference.value < 1.96 * unpaired


def test_equal_answers_differ_by_nothing() -> None:
    measured = score([answers(60, 100)])
    assert measured.minus(measured) == (0.0, ConfidenceInterval(0.0, 0.0))
    assert not measured.minus(measured).interval.excludes_zero


def test_seeds_are_joined_and_their_spread_is_students() -> None:
    rows = [answers(60, 100), answers(70, 100), answers(68, 100)]
    measured = over_seeds([score([row]) for row in rows])
    assert measured.value == pytest.approx(0.66)
    half = students_t.ppf(0.975, 2) * np.std([0.6, 0.7, 0.68], ddof=1) / math.sqrt(3)
    assert measured.seed_interval == pytest.approx((0.66 - half, 0.66 + half))
    assert score([rows[0]]).seed_interval is None


def test_a_correlation_is_computed_anew_on_every_resample() -> None:
    rng = np.random.default_rng(5)
    references = rng.binomial(1, 0.5, 80).astype(float)
    predictions = np.where(rng.random(80) < 0.2, 1 - references, references)
    measured = score([predictions.tolist()], "Matthews correlation", references=references)
    assert measured.value == pytest.approx(matthews_corrcoef(references, predictions))
    resampled = []
    for _ in range(NUM_RESAMPLES):
        chosen = rng.integers(0, 80, 80)
        resampled.append(matthews_corrcoef(references[chosen], predictions[chosen]))
    assert measured.standard_error == pytest.approx(np.std(resampled), rel=0.08)
    assert measured.interval == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.03)


def test_groups_count_alike_and_are_resampled_one_by_one() -> None:
    rows = [answers(80, 100) + answers(10, 40)]
    groups = (*100 * ["easy"], *40 * ["hard"])
    measured = score(rows, groups=groups)
    assert measured.value == pytest.approx((0.8 + 0.25) / 2)
    errors = [0.8 * 0.2 / 100, 0.25 * 0.75 / 40]
    assert measured.standard_error == pytest.approx(math.sqrt(sum(errors)) / 2, rel=0.05)
    other = score([answers(70, 100) + answers(10, 40)], groups=groups)
    assert measured.minus(other).value == pytest.approx(0.05)
    assert over_seeds([measured, other]).groups == groups


def test_the_same_score_has_the_same_interval_again() -> None:
    assert score([answers(5, 9)]).interval == score([answers(5, 9)]).interval


def test_other_items_are_not_compared() -> None:
    with pytest.raises(ValueError, match="not of the same items"):
        score([answers(5, 9)]).minus(score([answers(5, 10)]))
    with pytest.raises(ValueError, match="not measured on the same items"):
        over_seeds([score([answers(5, 9)]), score([answers(5, 10)])])


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([[]], {}, "no items"),
        ([[1.0]], {"references": np.ones(1)}, "references belong to"),
        ([[1.0]], {"metric": "F1"}, "references belong to"),
        ([[1.0]], {"groups": ("a", "b")}, "groups belong to"),
    ],
)
def test_what_is_no_score(rows: list[list[float]], fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(rows, **fields)  # type: ignore[arg-type]
