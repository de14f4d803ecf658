"""Exact histogram of document lengths, in memory that does not grow with the corpus."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.native import TokenFile

CHUNK_DOCUMENTS = 2**20


@dataclass(frozen=True, kw_only=True)
class LengthHistogram:
    """Count of the documents of each length."""

    lengths: NDArray[np.int64]
    """[n] lengths in tokens that occur, ascending."""
    documents: NDArray[np.int64]
    """[n] documents of each length."""

    @classmethod
    def of_corpus(cls, shards: Iterable[str]) -> Self:
        """Count the documents of all shards; OSError, ValueError where one cannot be opened."""
        lengths = documents = np.empty(0, dtype=np.int64)
        for shard in shards:
            file = TokenFile(shard, check=False)
            for begin in range(0, file.num_documents, CHUNK_DOCUMENTS):
                end = min(begin + CHUNK_DOCUMENTS, file.num_documents)
                found, counts = np.unique(file.read_lengths(begin, end), return_counts=True)
                merged, places = np.unique(np.concatenate([lengths, found]), return_inverse=True)
                totals = np.zeros(len(merged), dtype=np.int64)
                np.add.at(totals, places, np.concatenate([documents, counts]))
                lengths, documents = merged, totals
        return cls(lengths=lengths, documents=documents)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """[n] tokens in the documents of each length."""
        return self.lengths * self.documents

    @property
    def mean(self) -> float:
        """Mean length; 0 without a document."""
        return float(self.tokens.sum() / max(1, self.documents.sum()))

    def percentile(self, percent: float) -> int:
        """Return the smallest length that at least `percent` of the documents do not exceed.

        0 without a document.
        """
        if not len(self.lengths):
            return 0
        cumulative = np.cumsum(self.documents)
        needed = percent / 100 * int(cumulative[-1])
        # A rounded product must not need one document more: 99.9 % of 1,000 are 999.
        place = int(np.searchsorted(cumulative, needed - 1e-6))
        return int(self.lengths[place])
