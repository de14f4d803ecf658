"""Corpora in Megatron's format, which two of the loaders read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.loaders.rival import MadeUpText, Rival
from megatron_ettin.indexed import IndexedWriter


class IndexedRival(Rival):
    """A loader of .bin and .idx, which packs documents itself."""

    def write(self, path: Path, rows: NDArray[np.uint16]) -> None:
        """Write a .bin and .idx of documents [n, tokens]."""
        _write(path, rows.reshape(-1), np.full(len(rows), rows.shape[1], dtype=np.int64))

    def write_text(self, path: Path, text: MadeUpText) -> None:
        """Write a .bin and .idx; documents are packed when they are opened."""
        _write(path, text.ids, np.diff(text.bounds))


def _write(path: Path, ids: NDArray[np.uint16], lengths: NDArray[np.int64]) -> None:
    with IndexedWriter(str(path), "uint16") as writer:
        writer.add_many(ids, lengths)
