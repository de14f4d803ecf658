"""Minimal pairs: sentences scored by hand, phenomena, limits, and faults in the files."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.evaluation.model import open_model
from megatron_ettin.evaluation.readings import load
from megatron_ettin.evaluation.scoring import Continuation, RuleChoice, log_likelihoods
from megatron_ettin.evaluation.tasks.minimal_pairs import MinimalPairs
from tests.conftest import TinyCorpus
from tests.models import Kind, write_random_model


def write_pairs(path: Path, pairs: list[tuple[str, str]], **fields: Any) -> Path:
    lines = [
        json.dumps({"sentence_good": good, "sentence_bad": bad, **fields}) for good, bad in pairs
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "blimp"
    folder.mkdir()
    first = [(f"a cat sat {n}", f"a sat cat on it {n}") for n in range(6)]
    write_pairs(folder / "first.jsonl", first, linguistics_term="island_effects")
    write_pairs(folder / "second.jsonl", [("one two", "one two"), ("x y z", "z y x")])
    return folder


@pytest.mark.parametrize(
    ("kind", "rule", "expected_rule"),
    [
        ("encoder", "auto", "pseudo_log_likelihood"),
        ("decoder", "auto", "causal"),
        ("encoder", "bound", "bound"),
    ],
)
def test_the_likelier_sentence_is_chosen(
    kind: Kind,
    rule: RuleChoice,
    expected_rule: Any,
    folder: Path,
    tiny_corpus: TinyCorpus,
    tmp_path: Path,
) -> None:
    path = write_random_model(tmp_path / "model", kind, tiny_corpus.folder / "tokenizer")
    model = open_model(str(path))
    task = MinimalPairs(folder=str(folder), rule=rule, pairs_per_file=4, bound_samples=3)
    task.check()
    assert task.refusal(model) is None
    found = task.measure(model, seed=1, scratch=tmp_path)
    assert list(found.scores) == ["accuracy", "island_effects", "second"]
    total = found.scores["accuracy"]
    assert total.items == (*(f"first:{n}" for n in (1, 2, 3, 4)), "second:1", "second:2")
    values = total.predictions[0].tolist()
    assert values[4] == 0.5  # equal sentences
    assert found.notes == {"rule": expected_rule, "ties": 1}
    assert found.scores["island_effects"].predictions[0].tolist() == values[:4]
    assert found.scores["second"].predictions[0].tolist() == values[4:]
    again = task.measure(model, seed=1, scratch=tmp_path).scores["accuracy"]
    assert again.predictions[0].tolist() == values
    if rule != "auto":
        return
    loaded = load(model)
    given = [(f"a cat sat {n}", f"a sat cat on it {n}") for n in range(4)]
    by_hand = []
    for texts in [*given, ("x y z", "z y x")]:
        pair = [Continuation([], loaded.encode(text)) for text in texts]
        good, bad = log_likelihoods(loaded, pair, expected_rule)
        by_hand.append(float(good.log_likelihood > bad.log_likelihood))
    assert by_hand == [*values[:4], values[5]]


def test_a_rule_of_the_other_kind_is_refused(
    folder: Path, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    path = write_random_model(tmp_path / "model", "decoder", tiny_corpus.folder / "tokenizer")
    task = MinimalPairs(folder=str(folder), rule="pseudo_log_likelihood")
    assert "needs a model that fills masks" in str(task.refusal(open_model(str(path))))


def test_work_grows_with_the_square_of_the_length_for_encoders(
    folder: Path, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    tokenizer = tiny_corpus.folder / "tokenizer"
    task = MinimalPairs(folder=str(folder))
    encoder, decoder = (
        task.work(open_model(str(write_random_model(tmp_path / kind, kind, tokenizer))))
        for kind in ("encoder", "decoder")
    )
    # Characters // 4 + 1 of each sentence of the folder.
    lengths = [*6 * [11 // 4 + 1, 17 // 4 + 1], *2 * [7 // 4 + 1], *2 * [5 // 4 + 1]]
    assert decoder.forward_tokens == sum(lengths)
    assert encoder.forward_tokens == sum(n * (n + 2) for n in lengths)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"first\.jsonl:2: invalid JSON"),
        ("[1]", r"first\.jsonl:2: a JSON object is needed"),
        ('{"sentence_good": "a"}', r'first\.jsonl:2: no field "sentence_bad"'),
        ('{"sentence_good": " ", "sentence_bad": "b"}', r"first\.jsonl:2: sentence_good is ' '"),
    ],
)
def test_faults_name_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "first.jsonl", [("a", "b")])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        MinimalPairs(folder=str(tmp_path)).check()
    MinimalPairs(folder=str(tmp_path), pairs_per_file=1).check()


def test_a_folder_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.jsonl files"):
        MinimalPairs(folder=str(tmp_path)).check()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="no pairs"):
        MinimalPairs(folder=str(tmp_path)).check()
