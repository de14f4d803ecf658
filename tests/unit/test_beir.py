"""Collections in BEIR form and their measures, against direct formulas and damaged files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.evaluation.beir import Ranking, Relevance, ranking_scores, read_collection

DOCUMENTS = [
    {"_id": "d1", "title": "Ink", "text": "is used for writing."},
    {"_id": "d2", "title": "", "text": "Rain falls."},
    {"_id": "d3", "text": "Snow falls."},
]
QUERIES = [{"_id": "q1", "text": "a liquid"}, {"_id": "q2", "text": "a weather"}]
JUDGEMENTS = ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td3\t0"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "corpus.jsonl", map(json.dumps, DOCUMENTS))
    write(tmp_path / "queries.jsonl", map(json.dumps, QUERIES))
    (tmp_path / "qrels").mkdir()
    write(tmp_path / "qrels/test.tsv", JUDGEMENTS)
    return tmp_path


def write(path: Path, lines: object) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))  # type: ignore[attr-defined]


def test_a_folder_is_read(folder: Path) -> None:
    collection = read_collection(folder)
    assert collection.documents == {
        "d1": "Ink is used for writing.",
        "d2": "Rain falls.",
        "d3": "Snow falls.",
    }
    assert collection.queries == {"q1": "a liquid"}, "q2 has no judgement"
    assert collection.relevance == {"q1": {"d1": 2, "d3": 0}}


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("corpus.jsonl", "{", r"corpus\.jsonl:4: invalid JSON"),
        ("corpus.jsonl", "[]", r"corpus\.jsonl:4: a JSON object is needed"),
        ("corpus.jsonl", '{"_id": "d4"}', r'corpus\.jsonl:4: no field "text"'),
        ("corpus.jsonl", '{"_id": 4, "text": ""}', r'corpus\.jsonl:4: field "_id" is 4'),
        ("corpus.jsonl", '{"_id": "d1", "text": "x"}', r"corpus\.jsonl:4: _id 'd1' comes twice"),
        ("queries.jsonl", '{"_id": "q3"}', r'queries\.jsonl:3: no field "text"'),
        ("qrels/test.tsv", "q9\td1\t1", r"test\.tsv:4: query 'q9' is not in .*queries\.jsonl"),
        ("qrels/test.tsv", "q1\td9\t1", r"test\.tsv:4: document 'd9' is not in .*corpus\.jsonl"),
        ("qrels/test.tsv", "q1\td1\t1", r"test\.tsv:4: .* were judged"),
        ("qrels/test.tsv", "q1 d1 1", r"test\.tsv:4: 1 columns"),
        ("qrels/test.tsv", "q2\td1\tyes", r"test\.tsv:4: relevance 'yes'"),
    ],
)
def test_a_damaged_line_is_named(name: str, line: str, said: str, folder: Path) -> None:
    with (folder / name).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=said):
        read_collection(folder)


def test_missing_and_empty_files_are_named(folder: Path) -> None:
    write(folder / "qrels/test.tsv", JUDGEMENTS[:1])
    with pytest.raises(ValueError, match=r"test\.tsv: no judgements"):
        read_collection(folder)
    (folder / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"queries\.jsonl"):
        read_collection(folder)


def direct_measures(relevance: Relevance, ranking: Ranking, query: str) -> tuple[float, float]:
    """Return nDCG@10 (linear gain, base-2 discount) and Recall@100 by their formulas."""
    found = ranking[query]
    order = sorted(found, key=lambda document: (found[document], document), reverse=True)
    gains = [relevance[query].get(document, 0) for document in order]
    ideal = sorted(relevance[query].values(), reverse=True)

    def discounted(values: list[int]) -> float:
        return sum(value / math.log2(rank + 2) for rank, value in enumerate(values[:10]))

    num_relevant = sum(value > 0 for value in ideal)
    recall = sum(value > 0 for value in gains[:100]) / num_relevant
    return discounted(gains) / discounted(ideal), recall


def test_measures_equal_the_formulas() -> None:
    rng = np.random.default_rng(0)
    documents = [f"d{number}" for number in range(150)]
    relevance, ranking = {}, {}
    for query in map(str, range(20)):
        judged = rng.choice(documents, size=12, replace=False).tolist()
        relevance[query] = {document: int(rng.integers(0, 4)) for document in judged[1:]}
        relevance[query][judged[0]] = 1
        # Scores with few values: many are equal.
        ranking[query] = {document: float(rng.integers(0, 30)) for document in documents}
    scores = ranking_scores(relevance, ranking)
    expected = [direct_measures(relevance, ranking, query) for query in sorted(relevance)]
    for score, values in zip(scores.values(), np.array(expected).T, strict=True):
        assert score.items == tuple(sorted(relevance))
        np.testing.assert_allclose(score.predictions, [values], atol=1e-12)
        assert 0.0 < score.value < 1.0
