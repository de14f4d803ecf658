"""Write what a run was fed, step by step, in the layout of the published Ettin order.

There is one folder for each checkpoint, with files of at most 100 steps; each row of a file is a
row of the run. Documents, sources and exact steps are additions to the published layout. A file
appears when it is complete, and its metadata name its rows, so an interrupted export can continue.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_ettin.publication import publish_text, publishing
from megatron_ettin.queries.answer import add_shared_arguments, show
from megatron_ettin.queries.documents import Sidecars
from megatron_ettin.queries.ettin_card import ExportedFolder, dataset_card
from megatron_ettin.queries.provenance_of_rows import ProvenanceOfRows
from megatron_ettin.queries.record import digest_hex
from megatron_ettin.queries.recorded_run import CheckpointPoint, RecordedRun, open_run

EXAMPLE = "--layout ettin --run runs/encoder --output exported"
STEPS_PER_FILE = 100
#: Prefixes of phase names that the published layout repeats in the names of its folders.
PREFIXES = ("ext", "decay")
METADATA = "megatron_ettin"
#: Slots of the rows that are held in memory at a time.
_SLOTS = 4_194_304


@dataclass(frozen=True)
class _Written:
    rows: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Export:
    """Summary of the output folder."""

    run: str
    output: str
    layout: str
    files: int
    files_kept: int
    """Files among them that an earlier call wrote."""
    rows: int
    tokens: int
    folders: list[ExportedFolder]
    notes: list[str]


def export_ettin(
    run: RecordedRun, output: Path, begin: CheckpointPoint, end: CheckpointPoint
) -> list[ExportedFolder]:
    """Write all steps between two checkpoints and the dataset card; keep files that are complete.

    Raises:
        ValueError: no step lies between the two, a file belongs to another export, or tokens differ
            from the ledger's record of them.
    """
    if begin.step >= end.step:
        raise ValueError(f"no step lies between {begin.name} and {end.name}")
    writer = _ExportWriter(run, end)
    folders = []
    previous = begin
    total = end.step - begin.step
    with tqdm(total=total, desc="exporting", unit="step", disable=None) as bar:
        for number, point in enumerate(run.checkpoints, start=1):
            if not begin.step < point.step <= end.step:
                continue
            folder = output / f"{_prefix(run, point)}checkpoint_{number:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            folders.append(_write_folder(writer, folder, previous, point, bar))
            previous = point
    publish_text(output / "README.md", dataset_card(run, folders))
    return folders


def _prefix(run: RecordedRun, point: CheckpointPoint) -> str:
    name = run.order.phase_at(run.rows_of_step(point.step)[0]).name
    return next((f"{prefix}_" for prefix in PREFIXES if name.startswith(prefix)), "")


def _write_folder(
    writer: _ExportWriter, folder: Path, previous: CheckpointPoint, point: CheckpointPoint, bar: Any
) -> ExportedFolder:
    rows = tokens = files = kept = 0
    first = previous.step + 1
    while first <= point.step:
        # Files end at multiples of STEPS_PER_FILE and at checkpoints. So an export with more
        # checkpoints needs the same files, and keeps those that are there.
        last = min(point.step, -(-first // STEPS_PER_FILE) * STEPS_PER_FILE)
        path = folder / f"steps_{first:06d}_to_{last:06d}.parquet"
        expected = writer.metadata(first, last)
        if path.exists():
            written = _existing(path, expected)
            kept += 1
        else:
            written = writer.write(path, first, last, expected)
        files += 1
        rows, tokens = rows + written.rows, tokens + written.tokens
        bar.update(last - first + 1)
        first = last + 1
    return ExportedFolder(
        folder=folder.name,
        checkpoint=point.name,
        first_step=previous.step + 1,
        last_step=point.step,
        rows=rows,
        tokens=tokens,
        files=files,
        files_kept=kept,
    )


def _existing(path: Path, expected: dict[str, str]) -> _Written:
    """Return the counts of a complete file; raise ValueError if another export wrote it."""
    try:
        metadata = pq.read_metadata(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: no parquet file ({error}); remove it") from error
    saved = {k.decode(): v.decode() for k, v in (metadata.metadata or {}).items()}
    for name, value in expected.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{path}: is of another export ({name} is {saved.get(name)}, here {value}): name "
                f"another --output, or remove the file"
            )
    return _Written(metadata.num_rows, int(saved[f"{METADATA}.tokens"]))


class _ExportWriter:
    """Writer of files of steps, in batches of rows, which it compares with the ledger."""

    def __init__(self, run: RecordedRun, end: CheckpointPoint) -> None:
        self.run = run
        self.order = run.order
        sidecars, sources = Sidecars(run), run.order.source_names
        self.has_ids = any(sidecars.provenance(source) for source in sources)
        self.provenance = ProvenanceOfRows(run, sidecars, ("id", "url"), end=end.g, sources=sources)

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns of the files."""
        corpora = [self.order.corpus(name) for name in self.order.source_names]
        narrow = self.order.vocab_size <= 65_536 and all(c.dtype == "uint16" for c in corpora)
        fields = [
            ("step", pa.int64()),
            ("input_ids", pa.list_(pa.uint16() if narrow else pa.int32())),
            ("g", pa.int64()),
            ("slot", pa.int32()),
            ("source", pa.dictionary(pa.int32(), pa.string())),
            ("epoch", pa.int64()),
            ("documents", pa.list_(pa.int64())),
            ("offsets", pa.list_(pa.int64())),
            ("lengths", pa.list_(pa.int32())),
            ("positions", pa.list_(pa.int32())),
        ]
        if self.has_ids:
            fields += [("ids", pa.list_(pa.string())), ("urls", pa.list_(pa.string()))]
        return pa.schema(fields)

    def metadata(self, first: int, last: int) -> dict[str, str]:
        """Return the metadata of the file of these steps; they identify a complete file."""
        begin, end = self.run.rows_of_step(first)[0], self.run.rows_of_step(last)[1]
        fields = {"format": "ettin-layout/1", "steps": f"{first}-{last}", "rows": f"{begin}-{end}"}
        phase_id = self.order.phase_at(end - 1).phase_id
        if phase_id is not None:
            fields["phase_id"] = phase_id
        chosen = self.run.ledger.steps[first - 1 : last]
        if len(chosen):
            for name in ("order_digest", "token_digest"):
                fields[name] = digest_hex(chosen[name].sum(axis=0, dtype=np.uint64))
        return {f"{METADATA}.{name}": value for name, value in fields.items()}

    def write(self, path: Path, first: int, last: int, metadata: dict[str, str]) -> _Written:
        """Write steps first to last, inclusive; the file appears when it is complete."""
        rows = tokens = 0
        digest = np.zeros(2, dtype=np.uint64)
        recorded = metadata.get(f"{METADATA}.token_digest")
        with publishing(path) as temporary:
            with self._parquet(temporary) as file:
                for begin, end in self._stretches(first, last):
                    if recorded is None:
                        ids = self.order.tokens(begin, end)
                    else:
                        ids, digests = self.order.digested_tokens(begin, end)
                        digest += digests.sum(axis=0, dtype=np.uint64)
                    file.write_table(self._table(begin, end, ids))
                    rows += len(ids)
                    tokens += sum(map(len, ids))
                file.add_key_value_metadata({**metadata, f"{METADATA}.tokens": str(tokens)})
            # Raised within `publishing`, so that a file with other tokens never appears.
            if recorded is not None and recorded != digest_hex(digest):
                raise ValueError(
                    f"steps {first} to {last}: the tokens in today's files are not those that the "
                    f"ledger has recorded; ask `verify --tokens` which step differs"
                )
        return _Written(rows, tokens)

    def _parquet(self, path: Path) -> pq.ParquetWriter:
        # BYTE_STREAM_SPLIT stores each byte of the ids as a stream of its own; two of the four hold
        # zeros only. Compared with a dictionary per file: half the time, a tenth less on disk.
        return pq.ParquetWriter(
            path,
            self.schema,
            compression="zstd",
            use_dictionary=["source"],
            column_encoding={"input_ids.list.element": "BYTE_STREAM_SPLIT"},
        )

    def _stretches(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows [begin, end) of one phase, without gaps, up to _SLOTS slots."""
        begin, end = self.run.rows_of_step(first)
        for step in range(first + 1, last + 2):
            following = self.run.rows_of_step(step) if step <= last else (-1, -1)
            phase = self.order.phase_at(begin)
            if following[0] == end and end < phase.end_g:
                end = following[1]
                continue
            yield from _batches(begin, end, max(1, _SLOTS // phase.seq_length))
            begin, end = following

    def _table(self, begin: int, end: int, tokens: list[NDArray[np.int64]]) -> pa.Table:
        """Return rows [begin, end), none of them skipped, with these tokens."""
        pieces = self.order.pieces(begin, end)
        g = np.arange(begin, end, dtype=np.int64)
        # Pieces are sorted by g: row g has pieces splits[g - begin] to splits[g - begin + 1].
        splits = pieces.row_splits(begin, end).astype(np.int32)
        sources = pieces.source[splits[:-1]]
        step = self.run.steps_of_rows(g)
        columns = {
            "step": step,
            "input_ids": _lists(
                np.cumsum([0, *map(len, tokens)]), pa.array(np.concatenate(tokens))
            ),
            "g": g,
            "slot": g - self.run.done[step - 1, 0],
            "source": pa.DictionaryArray.from_arrays(sources, self.order.source_names),
            "epoch": pieces.epoch[splits[:-1]],
            "documents": _lists(splits, pa.array(pieces.document)),
            "offsets": _lists(splits, pa.array(pieces.offset)),
            "lengths": _lists(splits, pa.array(pieces.length)),
            "positions": _lists(splits, pa.array(pieces.position)),
        }
        if self.has_ids:
            known = self.provenance.look_up((begin, end), pieces.source, pieces.document)
            for name in ("id", "url"):
                columns[f"{name}s"] = _lists(splits, known[name].combine_chunks())
        arrays = [_as(columns[field.name], field.type) for field in self.schema]
        return pa.Table.from_arrays(arrays, schema=self.schema)


def _batches(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, end)) for first in range(begin, end, size)]


def _lists(splits: NDArray[Any], values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(splits.astype(np.int32)), values)


def _as(values: Any, kind: pa.DataType) -> pa.Array:
    array = values if isinstance(values, pa.Array) else pa.array(values)
    return array if array.type == kind else array.cast(kind)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_shared_arguments(parser, f"export {EXAMPLE}")
    add = parser.add_argument
    add("--layout", choices=["ettin"], required=True, help="ettin: one folder for each checkpoint")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="new folder, or that of an interrupted export",
    )
    start = "checkpoint, by name or step; default: 0, the start"
    add("--from", dest="begin", default="0", metavar="CKPT", help=start)
    add("--to", dest="end", metavar="CKPT", help="checkpoint; default: the last one")


def print_answer(args: argparse.Namespace) -> int:
    """Write the export and print its summary; return 0."""
    opened = open_run(args.run)
    begin = opened.checkpoint(args.begin)
    if args.end is None and not opened.checkpoints:
        raise ValueError(f"{args.run}: has no checkpoint yet, and the layout is by checkpoints")
    end = opened.checkpoints[-1] if args.end is None else opened.checkpoint(args.end)
    folders = export_ettin(opened, args.output, begin, end)
    left = opened.steps_done - end.step
    notes = [f"the {left} steps after {end.name} are not part of it"] if left else []
    answer = Export(
        run=str(args.run),
        output=str(args.output),
        layout=args.layout,
        files=sum(folder.files for folder in folders),
        files_kept=sum(folder.files_kept for folder in folders),
        rows=sum(folder.rows for folder in folders),
        tokens=sum(folder.tokens for folder in folders),
        folders=folders,
        notes=notes,
    )
    return show(answer, args)
