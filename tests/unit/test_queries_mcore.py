"""The reading queries on a run that Megatron trained."""

from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.queries.batch import RankSlice, describe_batch
from megatron_ettin.queries.corpus_scan import CorpusScan
from megatron_ettin.queries.docs import write_docs
from megatron_ettin.queries.documents import DocumentName
from megatron_ettin.queries.exposures import count_exposures
from megatron_ettin.queries.recorded_run import RecordedRun, open_run
from megatron_ettin.queries.search import search
from megatron_ettin.queries.sql import run_query
from megatron_ettin.queries.unseen import draw_unseen
from megatron_ettin.queries.where import locate
from tests.conftest import TinyCorpus
from tests.unit.mcore_runs import SEQ_LENGTH, Trained, train
from tools import order


@pytest.fixture(scope="module")
def trained(megatron_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("mcore") / "run"
    return train(folder, samples=200, weights=[0.7, 0.3], checkpoints=[5, 12])


@pytest.fixture
def run(trained: Trained) -> RecordedRun:
    return open_run(trained.folder)


def test_batch_is_what_megatron_reads(trained: Trained, run: RecordedRun) -> None:
    answer = describe_batch(run, 3)
    assert (answer.g_begin, answer.g_end) == (20, 30)
    for row in answer.rows:
        assert row.tokens == trained[row.g].tolist()
        assert {piece.document for piece in row.pieces} <= set(trained.documents(row.g))


def test_ranks_share_a_batch_as_megatrons_sampler_does(run: RecordedRun) -> None:
    """MegatronPretrainingSampler: rank r has rows [r * mbs, (r + 1) * mbs) of each mbs * DP."""
    tokens = 2 * SEQ_LENGTH
    rows = [
        [
            row.g
            for row in describe_batch(
                run,
                3,
                part=RankSlice(rank=rank, data_parallel_size=2, micro_batch_tokens=tokens),
            ).rows
        ]
        for rank in range(2)
    ]
    assert rows == [[20, 21, 24, 25, 28, 29], [22, 23, 26, 27]]


def test_where_docs_and_sql_agree(run: RecordedRun, tmp_path: Path) -> None:
    begin, end = run.checkpoint("5"), run.checkpoint("12")
    answer = write_docs(run, begin, end, tmp_path / "docs.parquet")
    assert answer.without_provenance == ["web", "books"]
    query = f"select source, document, g, step, slot, \"offset\" from '{tmp_path}/docs.parquet'"
    listed = {tuple(row.values()) for row in run_query(run, query).table.to_pylist()}
    found = set()
    for source in run.order.source_names:
        for ordinal in range(run.order.corpus(source).num_documents):
            for document in locate(run, DocumentName(doc=f"{source}:{ordinal}")).documents:
                found |= {
                    (source, ordinal, place.g, place.step, place.slot, place.offset)
                    for place in document.places
                    if begin.g <= place.g < end.g
                }
    assert listed == found
    assert len(listed) == answer.pieces
    table = run_query(run, "select sum(n_tokens) n from steps", begin=begin, end=end).table
    assert table["n"].to_pylist() == [answer.tokens]


def test_unseen_and_exposures(run: RecordedRun) -> None:
    at = run.checkpoint("5")
    pieces = run.order.pieces(0, at.g)
    web = np.unique(pieces.document[pieces.source == 0])
    (document,) = draw_unseen(run, at, num=1, seed=2, source="web").documents
    assert document.ordinal not in web
    (one,) = count_exposures(run, DocumentName(doc=f"web:{web[0]}"), at).documents
    mine = (pieces.source == 0) & (pieces.document == web[0])
    assert one.tokens_seen == pieces.length[mine].sum()
    last_step = int(pieces.g[mine].max()) // 10 + 1
    assert (one.last_step, one.steps_since_last) == (last_step, 5 - last_step)
    expected = run.order.row_tokens(last_step * 10, at.g).sum() if last_step < 5 else 0
    assert one.tokens_since_last == expected


def test_what_megatron_does_not_record_is_refused(trained: Trained, run: RecordedRun) -> None:
    with pytest.raises(SystemExit, match="its row plans are not recorded"):
        order.main(["plan", "--run", str(trained.folder)])
    with pytest.raises(ValueError, match="its masks are not recorded"):
        describe_batch(run, 1, is_masked=True)
    with pytest.raises(ValueError, match="tokenizer's files are not recorded"):
        describe_batch(run, 1, with_text=True)


def test_search_needs_the_tokenizer_by_name(
    megatron_rank: None, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    prefixes = {"alpha": str(tiny_corpus.folder / "alpha")}
    trained = train(tmp_path / "run", prefixes=prefixes)
    run, folder = open_run(trained.folder), tiny_corpus.folder / "tokenizer"
    with pytest.raises(ValueError, match="tokenizer's files are not recorded; name its folder wit"):
        CorpusScan(run, ["alpha"])
    corpus, tokenizer = run.order.corpus("alpha"), load_tokenizer(folder)
    texts = [tokenizer.decode(corpus.tokens(n)) for n in range(corpus.num_documents)]
    pieces = run.order.pieces(3, 4)
    longest = int(np.argmax(pieces.length))
    text = tokenizer.decode(
        corpus.tokens(int(pieces.document[longest]), int(pieces.offset[longest]), 6)
    )
    answer = search(run, CorpusScan(run, ["alpha"], folder), text)
    assert [each.ordinal for each in answer.found] == [n for n, t in enumerate(texts) if text in t]
    rows = {place.g for each in answer.found for place in each.places}
    assert 3 in rows
    assert all(text in tokenizer.decode(trained[g]) for g in rows)
