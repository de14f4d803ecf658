"""Numbers and differences of a study's arms, from results on disk, against slow references."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as students_t

from megatron_ettin.evaluation.results import read_result
from megatron_ettin.study import tables
from megatron_ettin.study.arms import Study
from megatron_ettin.study.comparison import StudyComparison, compare_arms
from tests.studies import MadeTask, made_study, write_results

WIDE = {"encoder": 0.8, "decoder": 0.6, "encoder-from-decoder": 0.6, "decoder-from-encoder": 0.6}
ALIKE = dict.fromkeys(WIDE, 0.5)
TASKS = {
    "reviews": MadeTask(kind="classification", probabilities=WIDE, seeds=(0, 1, 2)),
    "blimp": MadeTask(kind="minimal pairs", probabilities=ALIKE, names=("all", "binding")),
}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = made_study(tmp_path / "study", ["nano"], list(WIDE))
    write_results(study, TASKS)
    return study


@pytest.fixture
def comparison(study: Study) -> StudyComparison:
    return compare_arms(study.models(), TASKS, study.results)


def answers(study: Study, arm: str, task: str, seed: int) -> np.ndarray:
    """Return an arm's answers as they stand in the file."""
    path = Path(study.config.output) / "results" / f"nano-{arm}-seed_0" / task / f"seed_{seed}.json"
    return np.array(json.loads(path.read_text())["scores"].popitem()[1]["predictions"][0])


def test_a_difference_has_the_interval_of_a_slow_paired_bootstrap(
    study: Study, comparison: StudyComparison
) -> None:
    contrast = comparison.contrasts[0]
    assert (contrast.first, contrast.second, contrast.quantity.task) == (
        "encoder", "decoder", "reviews"
    )  # fmt: skip
    seeds = [answers(study, "encoder", "reviews", s) - answers(study, "decoder", "reviews", s)
             for s in range(3)]  # fmt: skip
    by_item = np.mean(seeds, axis=0)
    assert contrast.value == pytest.approx(by_item.mean())
    rng = np.random.default_rng(7)
    resampled = [by_item[rng.integers(0, 400, 400)].mean() for _ in range(4000)]
    assert contrast.interval == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.006)
    means = [differences.mean() for differences in seeds]
    half = students_t.ppf(0.975, 2) * np.std(means, ddof=1) / math.sqrt(3)
    assert contrast.seed_interval == pytest.approx((contrast.value - half, contrast.value + half))


def test_only_what_is_above_all_others_beyond_its_interval_is_marked(
    comparison: StudyComparison,
) -> None:
    assert {(quantity.task, arm) for quantity, arm in comparison.highest} == {
        ("reviews", "encoder")
    }
    assert len(comparison.contrasts) == 3 * 6
    # The best of two that cannot be told apart is not marked, however large its value is.
    blimp = [n for n in comparison.numbers if n.quantity.task == "blimp"]
    assert len(blimp) == 8


def test_a_difference_within_the_seeds_is_not_beyond(tmp_path: Path) -> None:
    study = made_study(tmp_path / "study", ["nano"], list(WIDE), seeds=[0, 1])
    write_results(study, TASKS)
    comparison = compare_arms(study.models(), TASKS, study.results)
    number = comparison.numbers[0]
    assert number.seed_kind == "training"
    assert sorted(number.by_seed) == [0, 1]
    assert number.score.predictions.shape == (6, 400)
    for contrast in comparison.contrasts:
        assert contrast.seed_interval is not None
        both = contrast.interval.excludes_zero and contrast.seed_interval.excludes_zero
        assert contrast.is_beyond == both


def test_missing_and_outdated_results_are_named(study: Study) -> None:
    study.results.path("nano-decoder-seed_0", "blimp", 0).unlink()
    other = {**TASKS, "reviews": MadeTask(kind="classification", probabilities=WIDE, num_items=9)}
    comparison = compare_arms(study.models(), other, study.results)
    reasons = {(gap.model, gap.task): gap.reason for gap in comparison.missing}
    assert reasons["nano-decoder-seed_0", "blimp"] == "no result"
    assert "another num_items" in reasons["nano-encoder-seed_0", "reviews"]
    assert {number.quantity.task for number in comparison.numbers} == {"blimp"}
    assert {number.arm for number in comparison.numbers} == set(WIDE) - {"decoder"}


def test_other_items_are_no_comparison(study: Study) -> None:
    path = study.results.path("nano-decoder-seed_0", "blimp", 0)
    document = json.loads(path.read_text())
    for score in document["scores"].values():
        score["items"][3] = "another"
    path.write_text(json.dumps(document))
    comparison = compare_arms(study.models(), TASKS, study.results)
    with pytest.raises(ValueError, match=r"nano, blimp, all: encoder and decoder: .*same items"):
        _ = comparison.contrasts
    path.write_text("{")
    with pytest.raises(ValueError, match=r"seed_0\.json: not a result"):
        compare_arms(study.models(), TASKS, study.results)


def test_tables_hold_the_same_numbers(study: Study, comparison: StudyComparison) -> None:
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(comparison))))
    numbers = [row for row in rows if row["kind"] == "number"]
    assert [float(row["value"]) for row in numbers] == [n.score.value for n in comparison.numbers]
    first = read_result(study.results.path("nano-encoder-seed_0", "blimp", 0))
    [row] = [r for r in numbers if (r["arm"], r["score"]) == ("encoder", "binding")]
    assert float(row["value"]) == first.scores["binding"].value
    assert (row["n"], row["seed_low"]) == ("400", "")
    differences = [row for row in rows if row["kind"] == "difference"]
    assert [row["beyond_its_interval"] for row in differences] == [
        "yes" if contrast.is_beyond else "no" for contrast in comparison.contrasts
    ]
    markdown = tables.as_markdown(comparison)
    assert markdown.count("**") == 2 * len(comparison.highest)


def test_sentences_claim_nothing_within_an_interval(comparison: StudyComparison) -> None:
    said = dict(tables.findings(comparison))
    contrast = comparison.contrasts[0]
    expected = f"encoder is ahead of decoder: {contrast.value:+.3f} [{contrast.interval.low:.3f}"
    assert any(sentence.startswith(expected) for sentence in said["reviews (accuracy)"])
    named = [s for sentences in said.values() for s in sentences if "ahead" in s]
    beyond = [c for c in comparison.contrasts if c.is_beyond and c.quantity.is_first]
    assert len(named) == len(beyond)
    assert any(s.startswith("interval holds the chance") for s in said["blimp (accuracy)"])
