"""A run as Arrow tables, computed batch by batch: rows, segments, steps and documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_ettin.order.digest import format_digest
from megatron_ettin.order.pieces import row_starts
from megatron_ettin.order.row_losses import RowLossReader, RowState
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.documents import Sidecars
from megatron_ettin.queries.recorded_run import RecordedRun

CHUNK_ROWS = 16_384
CHUNK_DOCUMENTS = 65_536
CHUNK_STEPS = 65_536

SOURCE = pa.dictionary(pa.int32(), pa.string())
ROWS = pa.schema(
    {
        "g": pa.int64(),
        "step": pa.int64(),
        "slot": pa.int64(),
        "source": SOURCE,
        "epoch": pa.int64(),
        "row": pa.int64(),
        "num_tokens": pa.int64(),
        "loss_sum": pa.float32(),
        "loss_tokens": pa.int64(),
    }
)
SEGMENTS = pa.schema(
    {
        "g": pa.int64(),
        "step": pa.int64(),
        "slot": pa.int64(),
        "position": pa.int32(),
        "source": SOURCE,
        "epoch": pa.int64(),
        "document": pa.int64(),
        "offset": pa.int64(),
        "length": pa.int32(),
    }
)
STEPS = pa.schema(
    {
        "step": pa.int64(),
        "phase": pa.int32(),
        "g_begin": pa.int64(),
        "g_end": pa.int64(),
        "n_tokens": pa.int64(),
        "order_digest": pa.string(),
        "token_digest": pa.string(),
        "mask_digest": pa.string(),
        "unix_ns": pa.int64(),
    }
)
PROVENANCE = pa.schema({"id": pa.string(), "url": pa.string(), "sha256": pa.string()})
DOCS = pa.schema(
    {
        "source": SOURCE,
        "ordinal": pa.int64(),
        **{field.name: field.type for field in PROVENANCE},
        "n_tokens": pa.int64(),
        "shard": pa.string(),
        "line": pa.int64(),
    }
)


@dataclass(frozen=True, kw_only=True)
class RunTables:
    """Tables of rows [begin, end) of a run, which it has trained on; skipped rows are left out.

    Every method yields record batches of its schema above, each of a few megabytes at most.
    """

    run: RecordedRun
    begin: int
    end: int
    sidecars: Sidecars

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Yield one entry per row, ascending; `row` is the number of the row in its pool.

        `loss_sum` and `loss_tokens` are null where no loss is on record.
        """
        path = RunFolder(self.run.folder).row_losses
        losses = RowLossReader.open(path) if path.is_file() else None
        for begin, end in self._stretches(CHUNK_ROWS):
            pieces = self.run.order.pieces(begin, end)
            # The first piece of each row stands for the row.
            first = row_starts(pieces.g)
            step, row_in_step = self._steps_and_places(pieces.g[first])
            columns = {
                "g": pieces.g[first],
                "step": step,
                "slot": row_in_step,
                "source": self._names(pieces.source[first]),
                "epoch": pieces.epoch[first],
                "row": pieces.row[first],
                "num_tokens": self.run.order.row_tokens(begin, end)[pieces.g[first] - begin],
                **({} if losses is None else _losses(losses, begin, end, pieces.g[first])),
            }
            yield _batch(columns, ROWS).filter(pa.array(step > 0))  # 0: a skipped row

    def segments(self, source: str | None = None) -> Iterator[pa.RecordBatch]:
        """Yield one entry per piece, by row, then by position in the row."""
        wanted = None if source is None else self.run.order.source_names.index(source)
        for begin, end in self._stretches(CHUNK_ROWS):
            pieces = self.run.order.pieces(begin, end)
            step, row_in_step = self._steps_and_places(pieces.g)
            here = step > 0 if wanted is None else (step > 0) & (pieces.source == wanted)
            columns = {
                "g": pieces.g[here],
                "step": step[here],
                "slot": row_in_step[here],
                "position": pieces.position[here],
                "source": self._names(pieces.source[here]),
                "epoch": pieces.epoch[here],
                "document": pieces.document[here],
                "offset": pieces.offset[here],
                "length": pieces.length[here],
            }
            yield _batch(columns, SEGMENTS)

    def steps(self) -> Iterator[pa.RecordBatch]:
        """Yield one entry per step within the rows; digests are hexadecimal, or null."""
        done = self.run.done
        inside = np.flatnonzero((done[:, 0] >= self.begin) & (done[:, 1] <= self.end))
        for chunk in range(0, len(inside), CHUNK_STEPS):
            index = inside[chunk : chunk + CHUNK_STEPS]
            yield _batch({"step": index + 1, **self._describe_steps(index)}, STEPS)

    def docs(self) -> Iterator[pa.RecordBatch]:
        """Yield every document of every source, seen or not; null without a sidecar."""
        for number, source in enumerate(self.run.order.source_names):
            corpus = self.run.order.corpus(source)
            for begin in range(0, corpus.num_documents, CHUNK_DOCUMENTS):
                ordinals = np.arange(begin, min(begin + CHUNK_DOCUMENTS, corpus.num_documents))
                known = self.describe(source, ordinals)
                columns = {
                    "source": self._names(np.full(len(ordinals), number, dtype=np.int32)),
                    "ordinal": ordinals,
                    "n_tokens": corpus.read_lengths(begin, begin + len(ordinals)),
                    **{name: known[name] for name in DOCS.names if name in known},
                }
                yield _batch(columns, DOCS)

    def describe(self, source: str, ordinals: NDArray[np.int64]) -> dict[str, pa.Array]:
        """Return columns id, url, sha256, shard, line of documents; none without a sidecar."""
        provenance = self.sidecars.provenance(source)
        if provenance is None:
            return {}
        columns = ("id", "url", "sha256", "shard", "line")
        table = provenance.documents(ordinals, columns).combine_chunks()
        return {name: table[name] for name in columns} | {"sha256": as_hexadecimal(table["sha256"])}

    def _stretches(self, rows: int) -> Iterator[tuple[int, int]]:
        for begin in range(self.begin, self.end, rows):
            yield begin, min(begin + rows, self.end)

    def _steps_and_places(
        self, g: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        step = self.run.steps_of_rows(g)
        begins = self.run.done[:, 0] if self.run.steps_done else np.zeros(1, dtype=np.int64)
        return step, g - begins[np.maximum(step - 1, 0)]

    def _names(self, source: NDArray[np.int32]) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(source, self.run.order.source_names)

    def _describe_steps(self, index: NDArray[np.int64]) -> dict[str, object]:
        begin, end = self.run.done[index, 0], self.run.done[index, 1]
        known = {
            "g_begin": begin,
            "g_end": end,
            "n_tokens": self.run.tokens_of_steps(int(index[0]) + 1, int(index[-1]) + 1),
        }
        records = self.run.ledger.steps[index[0] : index[-1] + 1]
        if not len(records):
            return known
        return {
            **known,
            **{name: records[name].astype(np.int64) for name in ("phase", "unix_ns")},
            **{
                name: [format_digest((low, high)) for low, high in records[name].tolist()]
                for name in ("order_digest", "token_digest")
            },
            "mask_digest": [f"{value:016x}" for value in records["mask_digest"].tolist()],
        }


def as_hexadecimal(hashes: pa.ChunkedArray) -> pa.Array:
    """Return hashes of 32 bytes as 64 hexadecimal digits each; null stays null."""
    texts = [None if value is None else value.hex() for value in hashes.to_pylist()]
    return pa.array(texts, pa.string())


def _losses(
    reader: RowLossReader, begin: int, end: int, g: NDArray[np.int64]
) -> dict[str, pa.Array]:
    """Return the columns of the losses of rows g [n], which lie in [begin, end)."""
    read = reader.read(begin, end)
    unknown = (read.states != RowState.TRAINED)[g - begin]
    return {
        "loss_sum": pa.array(read.sums[g - begin], mask=unknown),
        "loss_tokens": pa.array(read.tokens[g - begin], mask=unknown),
    }


def _batch(columns: dict[str, object], schema: pa.Schema) -> pa.RecordBatch:
    """Return a batch of the schema; missing columns are null."""
    count = len(next(iter(columns.values())))  # type: ignore[arg-type]
    arrays = []
    for field in schema:
        values = columns.get(field.name)
        if values is None:
            arrays.append(pa.nulls(count, field.type))
        elif isinstance(values, pa.ChunkedArray):
            arrays.append(values.cast(field.type).combine_chunks())
        elif isinstance(values, pa.Array):
            arrays.append(values.cast(field.type))
        else:
            arrays.append(pa.array(values).cast(field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
