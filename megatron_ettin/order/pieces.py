"""Rows as a table: which tokens of which documents stand where."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Pieces(NamedTuple):
    """Columns [n] with one entry per piece of a document, ordered by row, then by slot."""

    g: NDArray[np.int64]
    """Global row."""
    source: NDArray[np.int32]
    """Index into the order's `source_names`."""
    epoch: NDArray[np.int64]
    """How often the source's rows had all been drawn before."""
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
    """Whether the document ends here."""


def concatenate(parts: list[Pieces]) -> Pieces:
    """Return the pieces of several stretches of rows, one after the other; at least one."""
    return Pieces._make(np.concatenate(columns) for columns in zip(*parts, strict=True))
