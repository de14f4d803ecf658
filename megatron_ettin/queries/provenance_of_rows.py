"""Provenance of the documents of consecutive rows, looked up for many rows at once.

Rows draw documents from all over a corpus, so the documents of a single step lie in nearly every
row group of a sidecar. One pass over the sidecars therefore serves as many rows as fit into a
fixed amount of memory, and callers ask for rows in ascending order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_ettin.data.provenance import SCHEMA
from megatron_ettin.queries.documents import Sidecars
from megatron_ettin.queries.recorded_run import RecordedRun

STRETCH_BYTES = 200_000_000
"""Memory for provenance; at the end of a pass, its largest column is held twice."""
CHUNK_ROWS = 16_384


class ProvenanceOfRows:
    """Columns of the sidecars for pieces of rows; null if the source has no sidecar."""

    def __init__(
        self,
        run: RecordedRun,
        sidecars: Sidecars,
        columns: Sequence[str],
        *,
        end: int,
        sources: Sequence[str],
    ) -> None:
        """Prepare look-ups of pieces of `sources` in rows up to `end`; read nothing yet."""
        self._order = run.order
        self._columns = list(columns)
        self._schema = pa.schema([SCHEMA.field(name).with_nullable(True) for name in columns])
        self._last = end
        known = {
            number: provenance
            for number, name in enumerate(run.order.source_names)
            if name in sources and (provenance := sidecars.provenance(name)) is not None
        }
        self._sidecars = known
        largest = max(
            (sidecar.mean_bytes(self._columns) for sidecar in known.values()), default=0.0
        )
        self._max_documents = max(1, int(STRETCH_BYTES / max(1.0, largest)))
        self._begin = self._end = 0
        self._ordinals: dict[int, NDArray[np.int64]] = {}
        self._tables: dict[int, pa.Table] = {}

    def look_up(
        self, rows: tuple[int, int], source: NDArray[np.int32], document: NDArray[np.int64]
    ) -> pa.Table:
        """Return a table of n entries for the pieces (source, document) [n] of rows [begin, end).

        Raises:
            ValueError: a sidecar is damaged.
        """
        begin, end = rows
        if begin < self._begin or end > self._end:
            self._read(begin, end)
        parts = [self._schema.empty_table()]
        index = np.full(len(source), -1, dtype=np.int64)
        count = 0
        for number, ordinals in self._ordinals.items():
            here = np.flatnonzero(source == number)
            if len(here):
                places = np.searchsorted(ordinals, document[here])
                parts.append(self._tables[number].take(pa.array(places)))
                index[here] = np.arange(count, count + len(here))
                count += len(here)
        together = pa.concat_tables(parts).combine_chunks()
        return together.take(pa.array(index, mask=index < 0))

    def _read(self, begin: int, at_least: int) -> None:
        """Read the provenance of rows from `begin` on: as many as fit, and up to row `at_least`."""
        # Freed before the next pass, so that memory never holds the provenance of two passes.
        self._tables.clear()
        wanted: dict[int, list[NDArray[np.int64]]] = {number: [] for number in self._sidecars}
        documents, end = 0, begin
        while end < at_least or (end < self._last and documents < self._max_documents):
            stop = min(end + CHUNK_ROWS, max(self._last, at_least))
            pieces = self._order.pieces(end, stop)
            for number, parts in wanted.items():
                parts.append(np.unique(pieces.document[pieces.source == number]))
                documents += len(parts[-1])
            end = stop
        self._begin, self._end = begin, end
        for number, parts in wanted.items():
            self._ordinals[number] = np.unique(np.concatenate(parts))
            table = self._sidecars[number].documents(self._ordinals[number], self._columns)
            # `take` is five times as fast on one chunk as on one chunk for each row group.
            for place, field in enumerate(self._schema):
                table = table.set_column(place, field, table[field.name].combine_chunks())
            self._tables[number] = table
