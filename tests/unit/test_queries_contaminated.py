"""contaminated against words of decoded documents, compared one by one with a list of all rows."""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.queries import contamination_files, corpus_scan
from megatron_ettin.queries.documents import Document
from tests.native.scanned import shared_grams, words
from tests.unit.queried import Queried
from tools import order

N = 4
FIELDS = ("question", "choices")
#: What is in no document, and would be an element of a page that does not escape it.
NOWHERE = "<script>Nothing</script> of this zzzqqq is anywhere"


def texts_of(queried: Queried) -> dict[Document, str]:
    assert queried.run.config is not None
    tokenizer = load_tokenizer(Path(queried.run.config.data.tokenizer))
    return {
        Document(source, number): tokenizer.decode(queried.run.order.corpus(source).tokens(number))
        for source in queried.run.order.source_names
        for number in range(queried.run.order.corpus(source).num_documents)
    }


def make_items(queried: Queried) -> list[dict[str, Any]]:
    """Return items with words of documents as they are, altered, joined with others, or none."""
    texts, items = texts_of(queried), []
    for number in range(0, 60, 5):
        for source in ("alpha", "beta"):
            found = texts[Document(source, number)].split()
            items.append(
                {
                    "id": number if source == "alpha" else [number],
                    "question": "“" + " ".join(found[3:30]).upper() + "”?",
                    "choices": [NOWHERE, ", ".join(found[40:50]) + " " + NOWHERE],
                }
            )
    return [
        *items,
        {"question": "three words only", "choices": []},
        {"question": "", "choices": ""},
    ]


@dataclass(frozen=True)
class Expected:
    """Answers by a scan: for each item the share of its words, and rows."""

    in_documents: list[float]
    read_by: dict[str, list[float]]
    documents: list[dict[Document, int]]
    """Documents of each item, with the number of sequences that they share."""
    rows: list[int]
    first_g: list[int | None]


class Scan:
    """Sequences of some items in all documents of a run, found word by word."""

    def __init__(self, queried: Queried, items: list[dict[str, Any]]) -> None:
        self.queried = queried
        self.passages = [
            [words(text) for text in [item["question"], *item["choices"]]] for item in items
        ]
        self.numbers: dict[tuple[str, ...], int] = {}
        for item in self.passages:
            for gram in self.grams_of(item):
                self.numbers.setdefault(gram, len(self.numbers))
        self.holders: dict[int, set[Document]] = defaultdict(set)
        self.rows_with: dict[int, set[tuple[Document, int]]] = defaultdict(set)
        self._scan()

    @staticmethod
    def grams_of(item: list[list[str]]) -> list[tuple[str, ...]]:
        return [
            tuple(passage[at : at + N]) for passage in item for at in range(len(passage) - N + 1)
        ]

    def numbers_of(self, item: list[list[str]]) -> set[int]:
        return {self.numbers[gram] for gram in self.grams_of(item)}

    def _scan(self) -> None:
        run = self.queried.run
        assert run.config is not None
        tokenizer = load_tokenizer(Path(run.config.data.tokenizer))
        spelled = [tokenizer.decode([id_]).encode() for id_ in range(tokenizer.ids.vocab_size)]
        pieces_of: dict[Document, list[Any]] = defaultdict(list)
        for piece in self.queried.pieces:
            pieces_of[Document(piece.source, piece.document)].append(piece)
        for document in texts_of(self.queried):
            ids = run.order.corpus(document.source).tokens(document.ordinal).tolist()
            for number, begin, end in shared_grams(spelled, ids, self.numbers, N):
                self.holders[number].add(document)
                self.rows_with[number] |= {
                    (document, piece.g)
                    for piece in pieces_of[document]
                    if piece.offset <= begin and end <= piece.offset + piece.length
                }

    def read_before(self, g: int) -> set[int]:
        return {
            number for number, rows in self.rows_with.items() if any(row < g for _, row in rows)
        }

    def shares(self, accepted: set[int]) -> list[float]:
        """Return the share of each item's words in the given sequences."""
        shares = []
        for item in self.passages:
            covered = 0
            for passage in item:
                inside: set[int] = set()
                for at, gram in enumerate(self.grams_of([passage])):
                    inside |= set(range(at, at + N)) if self.numbers[gram] in accepted else set()
                covered += len(inside)
            shares.append(covered / max(1, sum(map(len, item))))
        return shares


def expect(queried: Queried, items: list[dict[str, Any]]) -> Expected:
    """Compare each item with each document, word by word."""
    scan, run = Scan(queried, items), queried.run
    points = {point.name: point.g for point in run.checkpoints} | {"last step": run.end_g}
    grams = [scan.numbers_of(item) for item in scan.passages]
    rows = [set().union(*(scan.rows_with[number] for number in each)) for each in grams]
    return Expected(
        in_documents=scan.shares(set(scan.holders)),
        read_by={name: scan.shares(scan.read_before(end)) for name, end in points.items()},
        documents=[
            {
                document: sum(document in scan.holders[number] for number in each)
                for document in set().union(*(scan.holders[number] for number in each))
            }
            for each in grams
        ],
        rows=[sum(g < run.end_g for _, g in each) for each in rows],
        first_g=[min((g for _, g in each), default=None) for each in rows],
    )


@pytest.fixture(scope="module")
def items(queried: Queried) -> list[dict[str, Any]]:
    return make_items(queried)


@pytest.fixture(scope="module")
def benchmark(items: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "test.jsonl"
    path.write_text("\n" + "".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture(scope="module")
def report(queried: Queried, benchmark: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "report"
    order.main(arguments(queried, benchmark, "--output", str(folder)))
    return folder


def arguments(queried: Queried, benchmark: Path, *more: str) -> list[str]:
    question = ["contaminated", "--run", str(queried.folder), "--benchmark", str(benchmark)]
    return [*question, "--fields", *FIELDS, "--ngram", str(N), *more]


def test_the_tables_are_those_of_a_scan(
    queried: Queried, items: list[dict[str, Any]], report: Path
) -> None:
    expected = expect(queried, items)
    found = pq.read_table(report / "items.parquet").to_pydict()
    assert found["line"] == list(range(2, len(items) + 2))
    assert found["id"] == [
        str(item["id"]) if isinstance(item.get("id"), int) else None for item in items
    ]
    assert found["overlap_in_documents"] == pytest.approx(expected.in_documents)
    assert found["overlap_read"] == pytest.approx(expected.read_by["last step"])
    assert found["documents"] == [len(documents) for documents in expected.documents]
    assert found["rows_read"] == expected.rows
    done = queried.run.end_g
    begun = [g is not None and g < done for g in expected.first_g]
    assert [step is not None for step in found["first_step"]] == begun
    for g, step, checkpoint in zip(
        expected.first_g, found["first_step"], found["first_checkpoint"], strict=True
    ):
        if step is not None:
            assert g is not None
            begin, end = queried.run.rows_of_step(step)
            assert begin <= g < end
            after = queried.run.checkpoint_after(g)
            assert checkpoint == (None if after is None else after.name)
    shared = pq.read_table(report / "documents.parquet").to_pylist()
    assert {
        (row["item"], Document(row["source"], row["ordinal"])): row["sequences"] for row in shared
    } == {
        (item, document): count
        for item, documents in enumerate(expected.documents)
        for document, count in documents.items()
    }
    assert all(
        row["id"] == f"alpha-{row['ordinal']}"
        for row in shared
        if row["source"] == "alpha" and row["ordinal"] not in (4, 5)
    )
    assert all(row["id"] is None for row in shared if row["source"] == "beta")
    grown = pq.read_table(report / "checkpoints.parquet").to_pylist()
    assert {(row["item"], row["read_by"]): row["overlap"] for row in grown} == pytest.approx(
        {
            (item, name): share
            for name, shares in expected.read_by.items()
            for item, share in enumerate(shares)
            if share
        }
    )
    firsts = expected.read_by[queried.run.checkpoints[0].name]
    lasts = expected.read_by["last step"]
    assert 0 < sum(share > 0 for share in firsts) < sum(share > 0 for share in lasts)
    assert sum(0 < share < 0.8 for share in lasts) > 3


def test_many_stretches_make_few_row_groups(
    queried: Queried,
    benchmark: Path,
    report: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Arrow remembers every row group: one for each stretch would let memory grow with a corpus."""
    whole = pq.read_table(report / "documents.parquet").to_pylist()
    monkeypatch.setattr(corpus_scan, "READ_TOKENS", 4000)
    nowhere = tmp_path / "nowhere.jsonl"
    nowhere.write_text(json.dumps({"question": NOWHERE, "choices": []}) + "\n")
    # A table that is written has more than group_rows - 1 rows, and is cut into groups.
    at_most = 2 * len(whole) // 10 + 1
    for items, group_rows, groups in (
        (benchmark, 10**6, range(1, 2)),
        (benchmark, 10, range(2, at_most + 1)),
        (nowhere, 10, range(1)),
    ):
        monkeypatch.setattr(contamination_files, "GROUP_ROWS", group_rows)
        order.main(arguments(queried, items, "--output", str(tmp_path / "report")))
        written = pq.ParquetFile(tmp_path / "report" / "documents.parquet")
        assert written.read().to_pylist() == ([] if items == nowhere else whole)
        assert written.num_row_groups in groups


def test_the_line_and_the_table_sum_the_items_up(
    queried: Queried,
    items: list[dict[str, Any]],
    benchmark: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = expect(queried, items)
    order.main(arguments(queried, benchmark, "--json"))
    answer = json.loads(capsys.readouterr().out)
    points = {"in documents": expected.in_documents} | expected.read_by
    assert [row["read_by"] for row in answer["overlap"]] == list(points)
    for row in answer["overlap"]:
        shares = np.array(points[row["read_by"]])
        assert row["items"] == (shares > 0).sum()
        assert row["items_above_20_percent"] == (shares > 0.2).sum()
        assert row["items_above_80_percent"] == (shares > 0.8).sum()
        assert row["mean_overlap"] == pytest.approx(shares.mean())
    assert answer["too_short"] == 2
    assert answer["documents"] == len(set().union(*expected.documents))
    read, found = answer["overlap"][-1], answer["overlap"][0]
    assert answer["summary"] == (
        f"{found['items']} of {len(items)} items share 4 words with a document; the run had read "
        f"{read['items']} of them by step {queried.run.steps_done}, "
        f"{read['items_above_80_percent']} almost whole (more than 80% of the words)"
    )
    order.main(arguments(queried, benchmark, "--source", "beta", "--json"))
    fewer = json.loads(capsys.readouterr().out)
    assert fewer["documents"] == sum(
        document.source == "beta" for document in set().union(*expected.documents)
    )


def test_the_page_stands_alone_and_shows_the_words(report: Path) -> None:
    html = (report / "report.html").read_text()
    assert not re.search(r"(?:src|href)=|@import|url\(", html), "the page loads something"
    assert "<script" not in html
    assert "scriptnothingscript of this zzzqqq" in html
    assert re.search(r"<mark>[a-z ]{40,}</mark>", html)
    assert re.search(r"line \d+, id \d+</strong>: \d+% read, first at step \d+", html)
    assert sorted(path.name for path in report.iterdir()) == [
        "checkpoints.parquet", "documents.parquet", "items.parquet", "report.html",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"question": "a", "choices": []}\n{"question": ', r"bad\.jsonl:2: invalid JSON"),
        ("[1]", r"bad\.jsonl:1: a JSON object is needed"),
        ('\n{"question": "a"}', r'bad\.jsonl:2: no field "choices"; there are question'),
        ('{"question": 3, "choices": []}', r'bad\.jsonl:1: field "question" is 3, neither a str'),
        ('{"question": "", "choices": ["a", 1]}', r"bad\.jsonl:1: field \"choices\" is \['a', 1\]"),
        (r'{"question": "a\ud800", "choices": []}', r"bad\.jsonl:1: .*character 1 is half of a"),
        ("\n", r"bad\.jsonl: has no items"),
    ],
)
def test_a_bad_line_is_named(queried: Queried, tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    with pytest.raises(SystemExit, match=message):
        order.main(arguments(queried, path, "--output", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_length_that_is_none_is_refused(queried: Queried, benchmark: Path) -> None:
    with pytest.raises(SystemExit, match="n is 0; it must be 1 to 1024"):
        order.main(arguments(queried, benchmark, "--ngram", "0"))
