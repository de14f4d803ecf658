"""One corpus of a Megatron run: from a sample to its documents, and back.

Megatron lays the shuffled documents of all epochs end to end (document_index) and cuts this stream
every seq_length tokens (sample_index). A row is one such sample, in shuffled order (shuffle_index).
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.native import TokenFile
from megatron_ettin.order.mcore.cache import IndexTables


class Stretches(NamedTuple):
    """Columns [n], one entry per stretch of a document that a sample reads, in reading order."""

    of: NDArray[np.int64]
    """Index into the samples that were asked for."""
    sample: NDArray[np.int64]
    """Number of the sample before the shuffle."""
    epoch: NDArray[np.int64]
    document: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    ends_document: NDArray[np.bool_]


class McoreDataset:
    """A corpus and the tables that Megatron-Core's GPTDataset made for it."""

    def __init__(
        self, file: TokenFile, tables: IndexTables, *, seq_length: int, extra_token: bool
    ) -> None:
        """Check that the tables fit the number of documents and tokens of the corpus.

        Raises:
            ValueError: they do not fit, or the corpus has documents of several sequences.
        """
        self.file = file
        self.tables = tables
        self._seq_length = seq_length
        self._extra = int(extra_token)
        _refuse_sequences(file)
        first, end = tables.first_document, tables.end_document
        whole = (first, end) == (0, file.num_documents)
        tokens = file.num_tokens if whole else int(file.lengths[first:end].sum(dtype=np.int64))
        epochs = len(tables.documents) // (end - first)
        expected = (epochs * tokens - self._extra) // seq_length
        # A validation split may keep its last, partial sample, counted by Megatron in float32.
        slack = 1 + (expected >> 23) if tables.description.split == "valid" else 0
        if abs(tables.num_samples - expected) > slack:
            self._refuse(
                "sample_index",
                f"{tables.num_samples} samples, but {epochs} epochs of {tokens} tokens in "
                f"{file.prefix} make {expected}",
            )

    def _refuse(self, table: str, what: str) -> None:
        path = self.tables.description.path(table)
        raise ValueError(f"{path}: {what}: the cache is of another corpus, or damaged")

    def stretches(self, drawn: NDArray[np.int64]) -> Stretches:
        """Return the stretches that the samples `drawn` [m] read; `drawn` indexes the dataset.

        With the extra token a sample has seq_length + 1 tokens. The next sample (before the
        shuffle) begins with the last of them. Documents without tokens are left out.
        """
        tables = self.tables
        sample = tables.shuffle[drawn].astype(np.int64)
        if len(sample) and not 0 <= sample.min() <= sample.max() < tables.num_samples:
            self._refuse("shuffle_index", f"{sample.max()} is not below {tables.num_samples}")
        first, begin = tables.samples[sample].astype(np.int64).T
        last, end = tables.samples[sample + 1].astype(np.int64).T
        counts = last - first + 1
        if len(sample) and (
            first.min() < 0 or last.max() >= len(tables.documents) or counts.min() < 1
        ):
            self._refuse("sample_index", "positions outside document_index or out of order")
        # One entry per document that a sample touches: `of` is its sample, `position` its place
        # in document_index.
        of = np.repeat(np.arange(len(sample)), counts)
        position = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(len(of))
        document = tables.documents[position].astype(np.int64)
        outside = (document < tables.first_document) | (document >= tables.end_document)
        if outside.any():
            self._refuse(
                "document_index",
                f"document {document[outside][0]} is not in [{tables.first_document}, "
                f"{tables.end_document}) of {self.file.prefix}",
            )
        tokens = self.file.lengths[document].astype(np.int64)
        # A sample may begin and end inside a document; those between are read whole.
        offset = np.where(position == first[of], begin[of], 0)
        stop = np.where(position == last[of], end[of] + self._extra, tokens)
        self._check_lengths(sample, of, offset, stop, tokens)
        held = stop > offset
        epoch = position // (tables.end_document - tables.first_document)
        columns = (of, sample[of], epoch, document, offset, stop - offset, stop == tokens)
        return Stretches._make(column[held] for column in columns)

    def _check_lengths(
        self,
        sample: NDArray[np.int64],
        of: NDArray[np.int64],
        offset: NDArray[np.int64],
        stop: NDArray[np.int64],
        tokens: NDArray[np.int64],
    ) -> None:
        wrong = (offset < 0) | (offset > stop) | (stop > tokens)
        if wrong.any():
            number = sample[of[np.argmax(wrong)]]
            self._refuse(
                "sample_index", f"sample {number} reads beyond a document of {self.file.prefix}"
            )
        read = np.bincount(of, weights=stop - offset, minlength=len(sample)).astype(np.int64)
        full = self._seq_length + self._extra
        short = (read != full) & ~((sample == self.tables.num_samples - 1) & (read < full))
        if short.any():
            number = int(np.argmax(short))
            self._refuse(
                "sample_index",
                f"sample {sample[number]} reads {read[number]} tokens of {self.file.prefix}, "
                f"not {full}",
            )

    def find(self, document: int) -> NDArray[np.int64]:
        """Return the drawn samples, in no order, that read a token of a document.

        The first call builds two tables: 8 bytes per entry of document_index, and 4 or 8 bytes
        per sample.
        """
        length = int(self.file.lengths[document])
        order = self._by_document
        begin, end = (
            np.searchsorted(self.tables.documents, document, side, sorter=order)
            for side in ("left", "right")
        )
        samples = [np.empty(0, dtype=np.int64)]
        for position in order[begin:end].tolist() if length else ():
            samples.append(self._samples_at(position, length))
        # A sample in which two epochs meet may hold the document twice.
        return self._drawn_as[np.unique(np.concatenate(samples))].astype(np.int64)

    def _samples_at(self, position: int, length: int) -> NDArray[np.int64]:
        """Return the samples that read a token of the `length` at a position of document_index."""
        samples = self.tables.samples
        starts = samples[:, 0]
        # bisect reads a few entries of the mapped table; np.searchsorted would copy the column.
        first = max(bisect_left(starts, position) - 1, 0)
        end = min(bisect_right(starts, position), self.tables.num_samples)
        at, offset = samples[first:end].astype(np.int64).T
        next_at, next_offset = samples[first + 1 : end + 1].astype(np.int64).T
        begins_before = (at < position) | (offset < length)
        ends_after = (next_at > position) | (
            (next_at == position) & (next_offset + self._extra > 0)
        )
        return first + np.flatnonzero(begins_before & ends_after)

    @cached_property
    def _by_document(self) -> NDArray[np.int64]:
        return np.argsort(self.tables.documents, kind="stable")

    @cached_property
    def _drawn_as(self) -> NDArray[Any]:
        """Inverse of the shuffle: the index at which each sample is drawn."""
        shuffle = self.tables.shuffle
        if len(shuffle) and not 0 <= shuffle.min() <= shuffle.max() < len(shuffle):
            self._refuse("shuffle_index", f"{shuffle.max()} is not below {len(shuffle)}")
        inverse = np.full(len(shuffle), len(shuffle), dtype=np.int64)
        inverse[shuffle] = np.arange(len(shuffle))
        if len(shuffle) and inverse.max() == len(shuffle):
            self._refuse("shuffle_index", f"sample {inverse.argmax()} is missing from the shuffle")
        return inverse


def _refuse_sequences(file: TokenFile) -> None:
    """Raise ValueError where Megatron's documents, which are sequences, are not ours."""
    with open(f"{file.prefix}.idx", "rb") as index:
        index.seek(18)
        sequences, boundaries = struct.unpack("<QQ", index.read(16))
    if boundaries != sequences + 1:
        raise ValueError(
            f"{file.prefix}.idx: {sequences} sequences in {boundaries - 1} documents. Megatron "
            f"counts sequences; only a corpus with one sequence per document can be read here"
        )
