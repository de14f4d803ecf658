"""where, exposures and unseen against a scan of every row; and the names of documents."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ettin.data.orders import open_order
from megatron_ettin.order import SampleOrder
from megatron_ettin.queries.documents import Document, DocumentName
from megatron_ettin.queries.exposures import count_exposures
from megatron_ettin.queries.recorded_run import RecordedRun
from megatron_ettin.queries.unseen import SeenByOrder, draw_unseen
from megatron_ettin.queries.where import locate
from tests.conftest import TinyCorpus
from tests.unit.queried import SKIPPED, Queried


def every_document(queried: Queried) -> list[tuple[str, int]]:
    order = queried.run.order
    return [(s, n) for s in order.source_names for n in range(order.corpus(s).num_documents)]


def test_where_finds_all_that_a_scan_finds(queried: Queried) -> None:
    checkpoints = [(point.g, point.name) for point in queried.run.checkpoints]
    assert len(checkpoints) == 3, "two that were asked for, one at the end of the phase"
    found = []
    for source, ordinal in every_document(queried):
        (document,) = locate(queried.run, DocumentName(doc=f"{source}:{ordinal}")).documents
        assert document.tokens == queried.run.order.corpus(source).length(ordinal)
        for place in document.places:
            if place.status == "skipped":
                assert 20 <= place.g < 25
                assert place.step is place.slot is place.checkpoint is None
                continue
            assert place.status == ("seen" if place.g < queried.done else "to come")
            assert place.checkpoint == next((n for g, n in checkpoints if g > place.g), None)
            columns = (place.g, place.step, place.slot, source, place.epoch, ordinal)
            found.append((*columns, place.offset, place.length))
    scanned = [
        (p.g, p.step, p.slot, p.source, p.epoch, p.document, p.offset, p.length)
        for p in queried.pieces
    ]
    assert sorted(found) == sorted(scanned)
    assert max(place[4] for place in found) >= 1, "no document is seen twice"


def test_a_document_that_is_skipped_is_said_to_be(queried: Queried) -> None:
    pieces = queried.run.order.pieces(20, 25)
    source = queried.run.order.source_names[pieces.source[0]]
    answer = locate(queried.run, DocumentName(doc=f"{source}:{pieces.document[0]}"))
    assert (20, "skipped") in [(p.g, p.status) for p in answer.documents[0].places]


@pytest.mark.parametrize("at", ["step_00000004", "30", None])
def test_exposures_are_those_of_a_scan(queried: Queried, at: str | None) -> None:
    run = queried.run
    point = run.checkpoint(at) if at else None
    end, last_step = (point.g, point.step) if point else (queried.done, run.steps_done)
    step_tokens = run.ledger.steps["n_tokens"].tolist()
    for source, ordinal in every_document(queried)[::7]:
        (found,) = count_exposures(run, DocumentName(doc=f"{source}:{ordinal}"), point).documents
        mine = [p for p in queried.pieces if (p.source, p.document) == (source, ordinal)]
        before = [p for p in mine if p.g < end]
        after = [p.step for p in mine if p.g >= end]
        assert found.tokens_seen == sum(p.length for p in before)
        assert found.exposures == found.tokens_seen / found.tokens
        assert found.next_step == (after[0] if after else None)
        if not before:
            assert found.first_step is found.last_step is found.tokens_since_last is None
            continue
        assert (found.first_step, found.last_step) == (before[0].step, before[-1].step)
        assert found.steps_since_last == last_step - before[-1].step
        assert found.tokens_since_last == sum(step_tokens[before[-1].step : last_step])


def test_unseen_documents_are_the_exact_complement(queried: Queried) -> None:
    run, at = queried.run, queried.run.checkpoint("4")
    seen = {(p.source, p.document) for p in queried.before(at.g)}
    rest = {
        (s, n)
        for s, n in every_document(queried)
        if (s, n) not in seen
        if run.order.corpus(s).length(n) > 0
    }
    answer = draw_unseen(run, at, num=len(rest), seed=3)
    drawn = [(document.source, document.ordinal) for document in answer.documents]
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) == rest
    fewer = draw_unseen(run, at, num=10, seed=3)
    assert [(d.source, d.ordinal) for d in fewer.documents] == drawn[:10]
    other = draw_unseen(run, at, num=10, seed=4)
    assert [(d.source, d.ordinal) for d in other.documents] != drawn[:10]
    with pytest.raises(ValueError, match=f"all but {len(rest)} of the 700 documents"):
        draw_unseen(run, at, num=len(rest) + 1, seed=3)


def test_unseen_answers_at_once_when_everything_was_drawn(
    queried: Queried, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No document of the first phase's pools, whose rows were all drawn, is looked up."""
    looked_up: list[tuple[str, int]] = []
    where = SampleOrder.where

    def record(self: SampleOrder, source: str, document: int) -> Any:
        looked_up.append((source, document))
        return where(self, source, document)

    monkeypatch.setattr(SampleOrder, "where", record)
    whole = queried.whole
    at = whole.checkpoints[-1]
    skipped = {tuple(p) for p in _skipped_pieces(whole)}
    drawn = {
        (pool.source, n)
        for pool, count in whole.order.drawn_before(at.g)
        if count >= pool.rows
        for n in range(pool.first_document, pool.end_document)
    }
    assert len(drawn) > 200
    seen = {(p.source, p.document) for p in queried.pieces}
    rest = [
        (s, n)
        for s, n in every_document(queried)
        if (s, n) not in seen and whole.order.corpus(s).length(n) > 0
    ]
    with pytest.raises(ValueError, match=f"all but {len(rest)} of the 700 documents"):
        draw_unseen(whole, at, num=700, seed=1)
    assert not set(looked_up) & (drawn - skipped)


def test_a_corpus_is_seen_where_its_pools_cover_it() -> None:
    nothing = np.empty(0, dtype=np.int64)
    assert SeenByOrder([(5, 9), (0, 5), (2, 4)], nothing).is_all_of(9)
    for ranges in ([(0, 5), (6, 9)], [(1, 9)], [(0, 8)], []):
        assert not SeenByOrder(ranges, nothing).is_all_of(9)
    skipped = SeenByOrder([(0, 9)], np.array([3]))
    assert not skipped.is_all_of(9)
    assert np.flatnonzero(skipped.is_open(np.arange(12))).tolist() == [3, 9, 10, 11]


def _skipped_pieces(run: RecordedRun) -> list[Document]:
    pieces = run.order.pieces(*SKIPPED)
    names = run.order.source_names
    return [
        Document(names[source], document)
        for source, document in zip(pieces.source.tolist(), pieces.document.tolist(), strict=True)
    ]


def test_unseen_draws_evenly(queried: Queried) -> None:
    run, at = queried.run, queried.run.checkpoint("4")
    counts: dict[tuple[str, int], int] = {}
    for seed in range(400):
        for document in draw_unseen(run, at, num=20, seed=seed, source="beta").documents:
            key = (document.source, document.ordinal)
            counts[key] = counts.get(key, 0) + 1
    seen = {p.document for p in queried.before(at.g) if p.source == "beta"}
    size = 200 - len(seen)
    assert {source for source, _ in counts} == {"beta"}
    expected = 400 * 20 / size
    drawn = np.array([*counts.values(), *[0] * (size - len(counts))])
    chi2 = float(((drawn - expected) ** 2 / expected).sum() / (1 - 20 / size))
    assert abs(chi2 - size) < 5 * (2 * size) ** 0.5


def test_unseen_passes_over_documents_that_are_dropped(
    queried: Queried, tiny_corpus: TinyCorpus
) -> None:
    assert queried.run.config is not None
    data = queried.run.config.data
    sources = {
        name: dataclasses.replace(source, min_doc_tokens=30)
        for name, source in data.sources.items()
    }
    config = dataclasses.replace(
        queried.run.config, data=dataclasses.replace(data, sources=sources)
    )
    run = dataclasses.replace(queried.run, config=config, order=open_order(config))
    answer = draw_unseen(run, run.checkpoint("4"), num=50, seed=1)
    assert min(document.tokens for document in answer.documents) >= 30


@pytest.mark.parametrize(
    ("name", "ordinals"),
    [
        (DocumentName(doc="alpha:17"), [17]),
        (DocumentName(doc="beta:0", source="beta"), [0]),
        (DocumentName(id="alpha-17", source="alpha"), [17]),
        (DocumentName(id="alpha-3", source="alpha"), [3, 4]),
        (DocumentName(sha=hashlib.sha256(b"alpha 9").hexdigest().upper()), [9]),
        (DocumentName(id="alpha-17"), [17]),
    ],
)
def test_documents_are_found_by_any_name(
    queried: Queried, name: DocumentName, ordinals: list[int]
) -> None:
    answer = locate(queried.run, name)
    assert [document.ordinal for document in answer.documents] == ordinals
    for document in answer.documents:
        if document.source == "alpha":
            assert document.url == f"https://alpha.example/{document.ordinal}"
        else:
            assert document.id is document.url is None


@pytest.mark.parametrize("ending", ["", "\n"])
def test_document_is_found_by_its_text(queried: Queried, tmp_path: Path, ending: str) -> None:
    (tmp_path / "text").write_text("alpha 12" + ending)
    (document,) = locate(queried.run, DocumentName(text_file=tmp_path / "text")).documents
    assert (document.source, document.ordinal, document.id) == ("alpha", 12, "alpha-12")


def test_text_that_is_no_text_is_refused(queried: Queried, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"alpha \xff")
    with pytest.raises(ValueError, match="text: byte 6 is not UTF-8"):
        locate(queried.run, DocumentName(text_file=tmp_path / "text"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (DocumentName(doc="alpha"), "expected SOURCE:ORDINAL"),
        (DocumentName(doc="alpha:-1"), "expected SOURCE:ORDINAL"),
        (DocumentName(doc="alpha:500"), "has documents 0 to 499"),
        (DocumentName(doc="gamma:1"), "no source 'gamma'; there are: alpha, beta"),
        (DocumentName(id="x", source="gamma"), "no source 'gamma'"),
        (DocumentName(id="x", source="alpha"), "no document with id 'x' in alpha"),
        (DocumentName(sha="12", source="alpha"), "not a SHA-256"),
    ],
)
def test_name_of_no_document_is_refused(queried: Queried, name: DocumentName, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        locate(queried.run, name)


def test_why_a_document_has_no_places(queried: Queried) -> None:
    """Every reason of the run is true of the same run, trained until it draws the document."""
    assert queried.whole.config is not None
    run, (short, long) = queried.whole, queried.whole.config.phases
    long = dataclasses.replace(long, train_tokens=10 * long.train_tokens)
    order = open_order(dataclasses.replace(run.config, phases=(short, long)))
    reasons = []
    for source, ordinal in every_document(queried):
        (document,) = locate(run, DocumentName(doc=f"{source}:{ordinal}")).documents
        assert (document.reason is None) == bool(document.places)
        if document.places:
            continue
        rows = order.where(source, ordinal)
        reasons.append(document.reason)
        assert document.reason == (
            f"never drawn: the run ends with row {run.order.num_rows - 1:,}; "
            f"had it gone on, the first draw would be row {rows[0]:,}"
        )
    assert len(reasons) > 20


def with_data(queried: Queried, **changes: Any) -> RecordedRun:
    """Return the run with another configuration of its data, and the order of that."""
    assert queried.whole.config is not None
    config = dataclasses.replace(
        queried.whole.config, data=dataclasses.replace(queried.whole.config.data, **changes)
    )
    return dataclasses.replace(queried.whole, config=config, order=open_order(config))


def test_a_document_that_no_phase_may_draw_is_left_out(queried: Queried) -> None:
    assert queried.whole.config is not None
    data = queried.whole.config.data
    some = with_data(queried, pools={"short": (0.0, 0.25), "long": (0.25, 0.5)})
    (document,) = locate(some, DocumentName(doc="beta:150")).documents
    assert document.reason == (
        "left out: the phases draw other documents (data.pools; short: 0 to 49, long: 50 to 99)"
    )
    without = with_data(queried, blend={name: {"alpha": 1.0} for name in data.blend})
    (document,) = locate(without, DocumentName(doc="beta:0")).documents
    assert document.reason == "left out: no phase draws from source 'beta' (data.blend)"
    sources = {
        name: dataclasses.replace(source, min_doc_tokens=10_000 if name == "beta" else 1)
        for name, source in data.sources.items()
    }
    short = with_data(queried, sources=sources, blend=without.config.data.blend)
    (document,) = locate(short, DocumentName(doc="beta:0")).documents
    assert document.reason == (
        f"left out: it has {document.tokens} tokens, fewer than 10000 (min_doc_tokens)"
    )


def test_source_without_provenance_is_named(queried: Queried) -> None:
    with pytest.raises(FileNotFoundError, match=r"'beta' has no .*beta\.docs\.parquet"):
        locate(queried.run, DocumentName(id="beta-1"))
