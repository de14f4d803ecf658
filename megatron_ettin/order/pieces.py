"""Rows as a table of pieces: which tokens of which documents stand where.

Both orders assemble the table here, source by source, and questions cut it by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Pieces(NamedTuple):
    """Columns [n] with one entry per piece of a document, ordered by row, then by slot."""

    g: NDArray[np.int64]
    """Global row."""
    source: NDArray[np.int32]
    """Index into the order's `source_names`."""
    epoch: NDArray[np.int64]
    """Number of times that all rows of the source had been drawn before."""
    row: NDArray[np.int64]
    """Row of the source's pool."""
    position: NDArray[np.int32]
    """First slot in the row."""
    document: NDArray[np.int64]
    """Ordinal in the source's corpus, from 0."""
    offset: NDArray[np.int64]
    """First token of the document that the piece holds."""
    length: NDArray[np.int32]
    """Tokens of the document."""
    slots: NDArray[np.int32]
    """Slots of the row: `length` and the special tokens that were added."""
    ends_document: NDArray[np.bool_]
    """True at the last piece of a document."""

    def row_splits(self, begin: int, end: int) -> NDArray[np.int64]:
        """Return [end - begin + 1]: the pieces of row begin + i are splits[i] : splits[i + 1]."""
        return np.searchsorted(self.g, np.arange(begin, end + 1))


def pieces_of_source(
    *,
    g: NDArray[np.int64],
    source: int,
    epoch: NDArray[np.int64],
    row: NDArray[np.int64],
    document: NDArray[np.int64],
    offset: NDArray[np.int64],
    length: NDArray[Any],
    slots: NDArray[Any],
    ends_document: NDArray[np.bool_],
) -> Pieces:
    """Return the pieces [n] of rows that one source fills, row by row; positions follow from slots.

    The pieces of a row stand side by side in the columns; the rows need not ascend.
    """
    return Pieces(
        g=g,
        source=np.full(len(g), source, dtype=np.int32),
        epoch=epoch,
        row=row,
        position=_positions(g, slots),
        document=document,
        offset=offset,
        length=length.astype(np.int32),
        slots=slots.astype(np.int32),
        ends_document=ends_document,
    )


def in_row_order(parts: Sequence[Pieces]) -> Pieces:
    """Return the pieces of several sources or phases as one table; at least one part."""
    together = Pieces._make(np.concatenate(columns) for columns in zip(*parts, strict=True))
    # A stable sort keeps the pieces of a row in the order of their slots.
    by_row = np.argsort(together.g, kind="stable")
    return Pieces._make(column[by_row] for column in together)


def row_starts(row: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the index of the first piece of each row; `row` [n] is the row of each piece."""
    return np.flatnonzero(np.diff(row, prepend=row[:1] - 1))


def _positions(row: NDArray[np.int64], slots: NDArray[Any]) -> NDArray[np.int32]:
    """Return the first slot of each piece in its row: the slots of the pieces before it there."""
    # Slots before each piece in the whole stream, less those before the first piece of its row.
    before = np.cumsum(slots, dtype=np.int64) - slots
    starts = row_starts(row)
    counts = np.diff(starts, append=len(row))
    return (before - np.repeat(before[starts], counts)).astype(np.int32)
