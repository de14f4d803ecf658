"""Write the documents that a run saw between two checkpoints to a parquet file."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from megatron_ettin.publication import publishing
from megatron_ettin.queries.answer import add_shared_arguments, show
from megatron_ettin.queries.documents import Sidecars, select_sources
from megatron_ettin.queries.provenance_of_rows import ProvenanceOfRows
from megatron_ettin.queries.recorded_run import CheckpointPoint, RecordedRun, open_run
from megatron_ettin.queries.tables import PROVENANCE, SEGMENTS, RunTables, as_hexadecimal


@dataclass(frozen=True, kw_only=True)
class Docs:
    """Summary of the file."""

    run: str
    begin: str
    end: str
    g_begin: int
    g_end: int
    output: str
    rows: int
    """Rows of the run between the two checkpoints, without skipped ones."""
    pieces: int
    """Rows of the file."""
    tokens: int
    """Tokens of documents; special tokens that packing adds are not counted."""
    without_provenance: list[str]
    """Sources without a sidecar: their documents have no id, url and sha256."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add_shared_arguments(
        parser, "docs --run runs/encoder --from 0 --to step_00001000 --output seen.parquet"
    )
    start = "checkpoint, by name or step; 0 is the start of the run"
    add("--from", dest="begin", required=True, metavar="CKPT", help=start)
    add("--to", dest="end", required=True, metavar="CKPT", help="a later checkpoint")
    add("--source", metavar="NAME", help="write only documents of this source")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="parquet file with one row for each piece",
    )


def print_answer(args: argparse.Namespace) -> int:
    """Print the answer; return 0."""
    opened = open_run(args.run)
    begin, end = opened.checkpoint(args.begin), opened.checkpoint(args.end)
    return show(write_docs(opened, begin, end, args.output, source=args.source), args)


def write_docs(
    run: RecordedRun,
    begin: CheckpointPoint,
    end: CheckpointPoint,
    output: Path,
    *,
    source: str | None = None,
) -> Docs:
    """Write every piece that the run saw between two checkpoints, in the order of training.

    Columns are `tables.SEGMENTS`, then `tables.PROVENANCE` if any source has a sidecar. Memory does
    not grow with the run. `output` appears when it is complete.

    Raises:
        ValueError: `begin` is not before `end`, or the run has no such source.
    """
    if begin.g >= end.g:
        raise ValueError(f"--from {begin.name} is not before --to {end.name}")
    sources = select_sources(run, source)
    sidecars = Sidecars(run)
    without = [name for name in sources if sidecars.provenance(name) is None]
    tables = RunTables(run=run, begin=begin.g, end=end.g, sidecars=sidecars)
    is_known = len(without) < len(sources)
    schema = pa.schema([*SEGMENTS, *PROVENANCE]) if is_known else SEGMENTS
    provenance = ProvenanceOfRows(run, sidecars, PROVENANCE.names, end=end.g, sources=sources)
    pieces = tokens = 0
    bar = tqdm(total=end.g - begin.g, desc=output.name, unit="row", unit_scale=True, disable=None)
    with (
        bar,
        publishing(output) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for batch in tables.segments(source):
            if batch.num_rows:
                pieces += batch.num_rows
                tokens += int(np.asarray(batch["length"]).sum())
                writer.write_batch(_with_provenance(provenance, batch) if is_known else batch)
                bar.update(int(np.asarray(batch["g"])[-1]) + 1 - begin.g - bar.n)
    steps = run.done[begin.step : end.step]
    return Docs(
        run=str(run.folder),
        begin=begin.name,
        end=end.name,
        g_begin=begin.g,
        g_end=end.g,
        output=str(output),
        rows=int((steps[:, 1] - steps[:, 0]).sum()),
        pieces=pieces,
        tokens=tokens,
        without_provenance=without,
    )


def _with_provenance(provenance: ProvenanceOfRows, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Append the columns of PROVENANCE to a batch of pieces, whose sources may be mixed."""
    g = np.asarray(batch["g"])
    source, document = np.asarray(batch["source"].indices), np.asarray(batch["document"])
    known = provenance.look_up((int(g[0]), int(g[-1]) + 1), source, document)
    known = known.set_column(
        PROVENANCE.get_field_index("sha256"), "sha256", as_hexadecimal(known["sha256"])
    ).combine_chunks()
    arrays = [*batch.columns, *(known[name].combine_chunks() for name in PROVENANCE.names)]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema([*SEGMENTS, *PROVENANCE]))
