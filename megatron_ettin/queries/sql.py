"""Query a run with SQL (DuckDB). Its tables are computed while DuckDB reads them.

rows: g, step, slot, source, epoch, row, num_tokens, loss_sum, loss_tokens. segments: g, step, slot,
position, source, epoch, document, offset, length. steps: step, phase, g_begin, g_end, n_tokens,
order_digest, token_digest, mask_digest, unix_ns. docs: source, ordinal, id, url, sha256, n_tokens,
shard, line.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from megatron_ettin.queries.answer import add_shared_arguments, show
from megatron_ettin.queries.documents import Sidecars
from megatron_ettin.queries.recorded_run import CheckpointPoint, RecordedRun, open_run
from megatron_ettin.queries.tables import DOCS, ROWS, SEGMENTS, STEPS, RunTables

MEMORY_LIMIT = "1GB"
"""Memory of DuckDB; a larger query, such as a join of all documents, spills to TMPDIR."""


@dataclass(frozen=True, kw_only=True)
class Sql:
    """Result of a query."""

    rows: int
    table: pa.Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("query", metavar="QUERY", help="SQL statement for DuckDB")
    add_shared_arguments(
        parser, 'sql --run runs/encoder "select source, sum(num_tokens) from rows group by source"'
    )
    start = "show rows, segments and steps after this checkpoint; default: 0, the start"
    add("--from", dest="begin", default="0", metavar="CKPT", help=start)
    end = "show rows, segments and steps up to this checkpoint; default: the last step"
    add("--to", dest="end", metavar="CKPT", help=end)


def print_answer(args: argparse.Namespace) -> int:
    """Print the answer; return 0."""
    opened = open_run(args.run)
    begin = opened.checkpoint(args.begin)
    end = opened.checkpoint(args.end) if args.end is not None else None
    return show(run_query(opened, args.query, begin=begin, end=end), args)


def run_query(
    run: RecordedRun,
    query: str,
    *,
    begin: CheckpointPoint | None = None,
    end: CheckpointPoint | None = None,
) -> Sql:
    """Run a query over all steps taken, or over those between two checkpoints.

    Raises:
        ValueError: DuckDB refuses the query.
    """
    tables = RunTables(
        run=run,
        begin=0 if begin is None else begin.g,
        end=run.end_g if end is None else end.g,
        sidecars=Sidecars(run),
    )
    with (
        tempfile.TemporaryDirectory(prefix="order_sql.") as spilled,
        duckdb.connect(
            config={"memory_limit": MEMORY_LIMIT, "temp_directory": spilled}
        ) as connection,
    ):
        for name, schema, batches in (
            ("rows", ROWS, tables.rows),
            ("segments", SEGMENTS, tables.segments),
            ("steps", STEPS, tables.steps),
            ("docs", DOCS, tables.docs),
        ):
            connection.register(name, _Stream(schema, batches))
        try:
            relation = connection.sql(query)
            table = pa.table({}) if relation is None else relation.to_arrow_table()
        except duckdb.Error as error:
            raise ValueError(f"sql: {error}") from error
    return Sql(rows=table.num_rows, table=table)


class _Stream:
    """Table that is computed anew for each scan, so a query may read it several times."""

    def __init__(self, schema: pa.Schema, batches: Callable[[], Iterator[pa.RecordBatch]]) -> None:
        self._schema = schema
        self._batches = batches

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        reader = pa.RecordBatchReader.from_batches(self._schema, self._batches())
        return reader.__arrow_c_stream__(requested_schema)
