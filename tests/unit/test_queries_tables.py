"""docs and sql against a scan of every row."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_ettin.order.digest import format_digest
from megatron_ettin.queries import provenance_of_rows, tables
from megatron_ettin.queries import sql as sql_module
from megatron_ettin.queries.docs import write_docs
from megatron_ettin.queries.sql import run_query
from tests.runs import made_losses
from tests.unit.queried import SKIPPED, STEPS, Queried


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the tables where no step, phase or skipped range ends."""
    for name, size in (("CHUNK_ROWS", 23), ("CHUNK_DOCUMENTS", 130), ("CHUNK_STEPS", 7)):
        monkeypatch.setattr(tables, name, size)
    monkeypatch.setattr(provenance_of_rows, "CHUNK_ROWS", 37)
    monkeypatch.setattr(provenance_of_rows, "STRETCH_BYTES", 10_000)


def ask(queried: Queried, query: str, **between: Any) -> list[tuple[Any, ...]]:
    answer = run_query(queried.run, query, **between)
    assert answer.rows == answer.table.num_rows
    return [tuple(row.values()) for row in answer.table.to_pylist()]


@pytest.mark.parametrize("source", [None, "alpha", "beta"])
@pytest.mark.parametrize(("begin", "end"), [("0", "4"), ("4", "step_00000030")])
def test_docs_are_the_pieces_of_a_scan(
    queried: Queried, tmp_path: Path, begin: str, end: str, source: str | None
) -> None:
    points = [queried.run.checkpoint(name) for name in (begin, end)]
    answer = write_docs(queried.run, *points, tmp_path / "docs.parquet", source=source)
    scanned = [
        piece
        for piece in queried.pieces
        if points[0].g <= piece.g < points[1].g and source in (None, piece.source)
    ]
    written = pq.read_table(tmp_path / "docs.parquet").to_pylist()
    columns = list(scanned[0]._fields)
    assert [tuple(row[name] for name in columns) for row in written] == [tuple(p) for p in scanned]
    assert answer.pieces == len(scanned)
    assert answer.tokens == sum(piece.length for piece in scanned)
    steps = queried.run.done[points[0].step : points[1].step]
    assert answer.rows == sum(last - first for first, last in steps.tolist())
    assert answer.without_provenance == ([] if source == "alpha" else ["beta"])
    if source == "beta":
        assert "url" not in written[0]
        return
    for row in written:
        url = f"https://alpha.example/{row['document']}" if row["source"] == "alpha" else None
        assert row["url"] == url
        assert (row["sha256"] is None) == (url is None)
    assert list(tmp_path.iterdir()) == [tmp_path / "docs.parquet"]


def test_docs_that_fail_leave_nothing(queried: Queried, tmp_path: Path) -> None:
    points = [queried.run.checkpoint(name) for name in ("4", "0")]
    with pytest.raises(ValueError, match="is not before"):
        write_docs(queried.run, *points, tmp_path / "docs.parquet")
    with pytest.raises(FileNotFoundError):
        write_docs(queried.run, *reversed(points), tmp_path / "nowhere" / "docs.parquet")
    assert list(tmp_path.iterdir()) == []


def test_segments_are_the_pieces_of_a_scan(queried: Queried) -> None:
    found = ask(queried, "select * from segments")
    assert found == [tuple(piece) for piece in queried.before(queried.done)]


def test_rows_have_their_losses(queried: Queried) -> None:
    sums, tokens = made_losses(0, queried.done)
    found = ask(queried, "select g, loss_sum, loss_tokens from rows")
    assert found == [(g, np.float32(sums[g]), tokens[g]) for g, _, _ in found]
    assert len(found) == queried.done - (SKIPPED[1] - SKIPPED[0])


def test_rows_are_those_of_a_scan(queried: Queried) -> None:
    found = ask(queried, "select g, step, slot, source, epoch, num_tokens from rows")
    firsts = {p.g: p for p in reversed(queried.before(queried.done))}
    tokens = queried.run.order.tokens(0, queried.done)
    expected = [(p.g, p.step, p.slot, p.source, p.epoch, len(tokens[p.g])) for p in firsts.values()]
    assert found == sorted(expected)
    (number,) = ask(queried, "select row from rows where g = 7")[0]
    assert number == queried.run.order.pieces(7, 8).row[0]


def test_steps_are_those_of_the_ledger(queried: Queried) -> None:
    expected = [
        (
            *(int(r[name]) for name in ("step", "phase", "g_begin", "g_end", "n_tokens")),
            *(format_digest(tuple(r[f"{n}_digest"].tolist())) for n in ("order", "token")),
            f"{int(r['mask_digest']):016x}",
            int(r["unix_ns"]),
        )
        for r in queried.run.ledger.steps
    ]
    assert ask(queried, "select * from steps") == expected
    assert len(expected) == STEPS


def test_docs_table_has_every_document(queried: Queried) -> None:
    found = ask(queried, "select source, ordinal, id, url, n_tokens, shard, line from docs")
    corpora = {name: queried.run.order.corpus(name) for name in ("alpha", "beta")}
    lengths = {name: c.read_lengths(0, c.num_documents) for name, c in corpora.items()}
    assert [row[:2] for row in found] == [
        (name, n) for name, column in lengths.items() for n in range(len(column))
    ]
    for source, ordinal, name, url, tokens, shard, line in found:
        assert tokens == lengths[source][ordinal]
        if source == "beta":
            assert (name, url, shard, line) == (None, None, None, None)
        else:
            assert url == f"https://alpha.example/{ordinal}"
            assert (shard, line) == ("raw.jsonl", ordinal + 1)
            assert (name is None) == (ordinal == 5)


def test_a_table_may_be_used_twice(queried: Queried) -> None:
    query = """
        select count(*), sum(a.num_tokens), sum(b.num_tokens), sum(n_tokens)
        from rows a join rows b using (g) join (select distinct g from segments) using (g)
        left join steps on a.g = steps.g_begin
    """
    ((count, first, second, steps),) = ask(queried, query)
    assert first == second == steps
    assert count == len({piece.g for piece in queried.before(queried.done)})


def test_rows_can_be_limited_to_checkpoints(queried: Queried) -> None:
    begin, end = queried.run.checkpoint("4"), queried.run.checkpoint("30")
    query = "select min(step), max(step), count(distinct step) from "
    for table in ("rows", "segments", "steps"):
        assert ask(queried, query + table, begin=begin, end=end) == [(5, 30, 26)]


def test_query_that_is_wrong_is_explained(queried: Queried) -> None:
    with pytest.raises(ValueError, match='"nothing" not found'):
        run_query(queried.run, "select nothing from rows")


def test_result_can_be_written_to_a_file(queried: Queried, tmp_path: Path) -> None:
    run_query(queried.run, f"copy (select g, source from rows) to '{tmp_path}/rows.parquet'")
    assert pq.read_table(tmp_path / "rows.parquet").num_rows == len(
        {piece.g for piece in queried.before(queried.done)}
    )


@pytest.mark.slow
def test_what_exceeds_the_memory_limit_goes_to_disk(
    queried: Queried, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_module, "MEMORY_LIMIT", "100MB")
    # 4 million keys of 40 bytes, of which a hash table alone exceeds the limit.
    query = """
        select count(*) as n, sum(length(k)) as bytes from (
            select repeat('x', 32) || i as k, count(*) from range(4000000) r(i) group by all)
    """
    (row,) = run_query(queried.run, query).table.to_pylist()
    digits = sum(len(str(i)) for i in range(4_000_000))
    assert (row["n"], row["bytes"]) == (4_000_000, 32 * 4_000_000 + digits)
    (found,) = run_query(
        queried.run, "select current_setting('temp_directory') as folder"
    ).table.to_pylist()
    assert not Path(found["folder"]).exists(), "it is removed with what lies in it"
