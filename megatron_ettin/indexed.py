"""Tokenised corpora in Megatron's .bin/.idx format.

A writer that publishes all or nothing and a checked reader, both thin over those of `native`.
"""

from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.native import TokenFile, TokenFileBuilder


def optimal_dtype(vocab_size: int) -> str:
    """Return the dtype in which Megatron-Core stores ids below vocab_size: "uint16" or "int32"."""
    # Megatron-Core's own limit (indexed_dataset.py), not 65,536: other readers expect its choice.
    return "uint16" if vocab_size < 65_500 else "int32"


class IndexedWriter(TokenFileBuilder):
    """Write one corpus; the block's normal end publishes it, an exception removes it.

    Use as `with IndexedWriter(prefix, dtype) as writer: writer.add(ids)`.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.abort()  # without effect after a commit


class IndexedReader(TokenFile):
    """Read a corpus as a sequence of documents, each an int64 array of token ids."""

    def __len__(self) -> int:
        return self.num_documents

    def __getitem__(self, document: int) -> NDArray[np.int64]:
        return self.tokens(document)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return (self.tokens(document) for document in range(self.num_documents))
