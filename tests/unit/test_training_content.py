"""What a run was trained on by source and phase, against a slow list of all pieces."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.order.ledger import Ledger
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.recorded_run import open_run
from megatron_ettin.queries.training_content import (
    SIZES,
    SourceContent,
    _size,
    count_contents,
    estimate_contents,
    write_training_content,
)
from tests.conftest import TinyCorpus
from tests.runs import record_run, tiny_config
from tests.unit.queried import Queried

#: Headings of the template (C(2025) 8311), in their order.
HEADINGS = [
    "1. General information",
    "1.1. Provider identification",
    "1.2. Model identification",
    "1.3. Modalities, overall training data size and other characteristics",
    "2. List of data sources",
    "2.1. Publicly available datasets",
    "2.2. Private non-publicly available datasets obtained from third parties",
    "2.3. Data crawled and scraped from online sources",
    "2.4. User data",
    "2.5. Synthetic data",
    "2.6. Other sources of data",
    "3. Data processing aspects",
    "3.1. Respect of reservation of rights from text and data mining exception or limitation",
    "3.2. Removal of illegal content",
    "3.3. Other information",
]


def slow_contents(queried: Queried) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Return (rows, tokens, documents) by phase and source, from the list of all pieces."""
    rows: dict[Any, set[int]] = defaultdict(set)
    documents: dict[Any, set[int]] = defaultdict(set)
    for piece in queried.before(queried.done):
        key = (queried.run.order.phase_at(piece.g).name, piece.source)
        rows[key].add(piece.g)
        documents[key].add(piece.document)
    return {
        key: (
            len(rows[key]),
            sum(len(tokens) for g in rows[key] for tokens in queried.run.order.tokens(g, g + 1)),
            len(documents[key]),
        )
        for key in rows
    }


def figures(content: SourceContent) -> tuple[int, int, int]:
    return content.rows, content.tokens, content.documents


def test_counts_are_those_of_the_pieces(queried: Queried) -> None:
    contents = list(count_contents(queried.run))
    assert {(c.phase, c.source): figures(c) for c in contents} == slow_contents(queried)
    assert sum(c.tokens for c in contents) == queried.run.ledger.steps["n_tokens"].sum()


def test_estimates_are_near_and_their_sums_exact(queried: Queried) -> None:
    """Rows and tokens of a few rows scatter; what whole epochs give is exact."""
    counted, estimated = list(count_contents(queried.run)), list(estimate_contents(queried.run))
    assert [(c.phase, c.source, c.epochs) for c in estimated] == [
        (c.phase, c.source, c.epochs) for c in counted
    ]
    total = queried.run.ledger.steps["n_tokens"].sum()
    assert sum(c.tokens for c in estimated) == pytest.approx(total, abs=len(counted))
    for exact, near in zip(counted, estimated, strict=True):
        assert near.tokens == pytest.approx(exact.tokens, rel=0.1)
        assert near.documents == pytest.approx(exact.documents, rel=0.15, abs=8)
        if exact.epochs >= 2:
            assert near.documents == exact.documents


def test_phases_that_share_a_pool_count_their_own_rows(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """The second phase goes on where the first has left the pool."""
    common = {"seq_length": 128, "global_batch_size": 8}
    phases = [{"name": name, "train_tokens": 12_000, **common} for name in ("short", "long")]
    sections = {"phases": phases, "data": {**tiny_corpus.data, "pools": {}}}
    run = open_run(record_run(tiny_config(tiny_corpus, tmp_path / "run", **sections)))
    contents = list(count_contents(run))
    pools = [pool for phase in run.order.spec.phases for pool in phase.pools]
    assert any(pool.drawn for pool in pools)
    assert [c.rows for c in contents] == [
        round(c.epochs * pool.rows) for c, pool in zip(contents, pools, strict=True)
    ]
    assert sum(c.rows for c in contents) == run.order.num_rows
    assert [c.rows for c in estimate_contents(run)] == [c.rows for c in contents]


def test_a_run_of_many_rows_is_estimated_and_says_so(
    queried: Queried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "content.md"
    assert write_training_content(queried.run, output).is_counted
    assert "about" not in output.read_text()
    monkeypatch.setattr("megatron_ettin.queries.training_content.COUNTED_ROWS", 10)
    answer = write_training_content(queried.run, output)
    assert not answer.is_counted
    assert f"about {answer.contents[0].tokens:,}" in output.read_text()


def test_the_summary_has_the_headings_of_the_template(queried: Queried, tmp_path: Path) -> None:
    output = tmp_path / "content.md"
    answer = write_training_content(queried.run, output)
    text = output.read_text()
    headings = [line.lstrip("#").strip() for line in text.splitlines() if line.startswith("##")]
    assert headings == HEADINGS
    assert answer.order_id in text
    assert "none: the weights were initialised anew" in text
    for content in answer.contents:
        assert f"| {content.phase} | {content.source} | {content.tokens:,} |" in text
        assert content.corpus_documents >= content.documents


@pytest.mark.parametrize(
    ("tokens", "name"),
    [
        (0, "Less than 1 billion tokens"),
        (10**9 - 1, "Less than 1 billion tokens"),
        (10**9, "1 billion to 10 trillion tokens"),
        (10**13, "More than 10 trillion tokens"),
    ],
)
def test_the_size_is_one_of_the_templates_ranges(tokens: int, name: str) -> None:
    assert _size(tokens) == name
    assert name in {entry for _, entry in SIZES}


def test_a_run_without_steps_has_no_contents(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    run = record_run(tiny_config(tiny_corpus, tmp_path / "run"), steps=0)
    assert len(Ledger.read(RunFolder(run).ledger).steps) == 0
    answer = write_training_content(open_run(run), tmp_path / "content.md")
    assert (answer.tokens, answer.contents) == (0, [])
