"""Lookups in the order of a run that Megatron-LM trained, from its index caches.

`epoch` and `row` are Megatron's: a document's position in document_index divided by the documents
of the split, and the number of the sample before the shuffle. Megatron shuffles several epochs
together, so a document may come twice in one "epoch" and not at all in the next.

A row has the tokens that Megatron reads for it: seq_length + 1, of which the first seq_length are
the input and the last seq_length the labels (with `add_extra_token: false` only seq_length).
Neighbours before the shuffle share one token, which counts in both.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.native import RowPlan, TokenCorpus, TokenFile
from megatron_ettin.order.mcore.cache import open_cache
from megatron_ettin.order.mcore.dataset import McoreDataset
from megatron_ettin.order.mcore.run import FORMAT, McoreRun
from megatron_ettin.order.order import NotRecordedError, OrderPhase
from megatron_ettin.order.pieces import Pieces, in_row_order, pieces_of_source
from megatron_ettin.order.spec import OrderSpec, PoolSpec
from megatron_ettin.rows import Rows, TokenIds


class McoreOrder:
    """Rows by number: row g is sample g of Megatron's training dataset.

    Iteration s takes the rows `run.schedule.rows_of_step(s)`, as Megatron's default, sequential
    `--dataloader-type single` does.
    """

    def __init__(self, run: McoreRun) -> None:
        """Open the corpora and the caches.

        Raises:
            OSError: a corpus or a cache is missing.
            ValueError: a file is damaged, no cache or several fit, or the cache has too few rows.
        """
        self.run = run
        files = {name: TokenFile(prefix) for name, prefix in run.prefixes.items()}
        cache = open_cache(run, {name: file.num_documents for name, file in files.items()})
        self._datasets = {
            name: McoreDataset(
                file, tables, seq_length=run.seq_length, extra_token=run.add_extra_token
            )
            for (name, file), tables in zip(files.items(), cache.tables, strict=True)
        }
        self._blend = cache.blend
        self._drawn_at: dict[str, NDArray[np.int64]] = {}
        cached = (
            len(cache.blend.dataset) if cache.blend is not None else cache.tables[0].num_samples
        )
        if self.num_rows > cached:
            raise ValueError(
                f"{run.cache}: {run.train_steps} steps are {self.num_rows} rows, but the cache has "
                f"{cached}: it is of a shorter run, or train_steps or global_batch_size is wrong"
            )

    @property
    def num_rows(self) -> int:
        """Rows of all iterations; the caches may hold some more."""
        return self.run.num_rows

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open the run that `folder`/config.yaml describes."""
        return cls(McoreRun.read(folder))

    @property
    def format(self) -> str:
        """Value of the field `order` in the run's config.yaml."""
        return FORMAT

    @property
    def vocab_size(self) -> int:
        """Number of the ids that the widest corpus can store; no tokenizer is recorded."""
        return max(int(np.iinfo(data.file.dtype).max) + 1 for data in self._datasets.values())

    @property
    def phases(self) -> tuple[OrderPhase]:
        """One phase: all rows of the run."""
        return (
            OrderPhase(
                name="",
                start_g=0,
                end_g=self.num_rows,
                seq_length=self.run.seq_length,
                phase_id=None,
            ),
        )

    def phase_at(self, g: int) -> OrderPhase:
        """Return the one phase; ValueError if the run has no such row."""
        if not 0 <= g <= self.num_rows:
            raise ValueError(f"row {g} is beyond the run's {self.num_rows} rows")
        return self.phases[0]

    def seq_length(self, g: int) -> int:
        """Return the slots of row `g`: its tokens without the last label."""
        return self.phase_at(g).seq_length

    @property
    def source_names(self) -> list[str]:
        """Names of the corpora; `Pieces.source` counts in this list."""
        return list(self._datasets)

    def prefixes(self, source: str) -> list[str]:
        """Return the path of a source's corpus, without suffix: Megatron knows no shards."""
        return [self.run.prefixes[source]]

    def corpus(self, source: str) -> TokenCorpus:
        """Return a source's corpus."""
        return TokenCorpus([self._datasets[source].file])

    def content_id(self, source: str) -> str:
        """Return the real path of a source's corpus: Megatron keeps no hash of what it read."""
        return os.path.realpath(self.run.prefixes[source])

    def shortest_document(self, source: str) -> int:
        """Return 1: Megatron drops no document, but of an empty one it reads nothing."""
        return 1

    def pieces(self, begin: int, end: int) -> Pieces:
        """Return which tokens of which documents make up the rows [begin, end).

        Raises:
            ValueError: rows outside the run, or a cache that does not belong to the corpora.
        """
        drawn_from, drawn = self._locate(begin, end)
        parts = []
        for source, dataset in enumerate(self._datasets.values()):
            here = np.flatnonzero(drawn_from == source)
            read = dataset.stretches(drawn[here])
            parts.append(
                pieces_of_source(
                    g=begin + here[read.of],
                    source=source,
                    epoch=read.epoch,
                    row=read.sample,
                    document=read.document,
                    offset=read.offset,
                    length=read.length,
                    slots=read.length,
                    ends_document=read.ends_document,
                )
            )
        return in_row_order(parts)

    def tokens(self, begin: int, end: int) -> list[NDArray[np.int64]]:
        """Return the tokens of each of the rows [begin, end), as stored in the corpora."""
        pieces = self.pieces(begin, end)
        files = [dataset.file for dataset in self._datasets.values()]
        read = [
            files[source].tokens(document, offset, length)
            for source, document, offset, length in zip(
                *(c.tolist() for c in (pieces.source, pieces.document, pieces.offset)),
                pieces.length.tolist(),
                strict=True,
            )
        ]
        splits = pieces.row_splits(begin, end)
        return [
            np.concatenate([np.empty(0, dtype=np.int64), *read[first:last]])
            for first, last in itertools.pairwise(splits.tolist())
        ]

    def row_tokens(self, begin: int, end: int) -> NDArray[np.int64]:
        """Return the tokens of each of the rows [begin, end), without reading them."""
        pieces = self.pieces(begin, end)
        counts = np.bincount(pieces.g - begin, weights=pieces.length, minlength=end - begin)
        return counts.astype(np.int64)

    def where(self, source: str, document: int) -> NDArray[np.int64]:
        """Return every row of the run, ascending, that reads a token of a document.

        The first call for a source builds its inverse tables (`McoreDataset.find`).

        Raises:
            IndexError: the source has no such document.
        """
        dataset = self._datasets[source]
        if not 0 <= document < dataset.file.num_documents:
            raise IndexError(
                f"source {source!r} has documents 0 to {dataset.file.num_documents - 1}, not "
                f"{document}"
            )
        drawn = dataset.find(document)
        if self._blend is None:
            return np.sort(drawn[drawn < self.num_rows])
        rows = self._rows_drawn_from(source)
        return np.sort(rows[drawn[drawn < len(rows)]])

    def drawn_before(self, g: int) -> Iterator[tuple[PoolSpec, int]]:
        """Yield nothing: Megatron shuffles several epochs together, so no pool ever ends."""
        yield from ()

    @property
    def spec(self) -> OrderSpec:
        """Raise NotRecordedError."""
        raise NotRecordedError(self.run.folder, "phases and pools")

    @property
    def ids(self) -> TokenIds:
        """Raise NotRecordedError."""
        raise NotRecordedError(self.run.folder, "special tokens")

    def rows(self, phase_index: int, g: NDArray[np.int64]) -> Rows:
        """Raise NotRecordedError."""
        raise NotRecordedError(self.run.folder, "special tokens")

    def plans(self, phase_index: int) -> Iterator[tuple[PoolSpec, RowPlan]]:
        """Raise NotRecordedError."""
        raise NotRecordedError(self.run.folder, "row plans")

    def plan_paths(self) -> set[Path]:
        """Raise NotRecordedError."""
        raise NotRecordedError(self.run.folder, "row plans")

    def order_digests(self, begin: int, end: int) -> NDArray[np.uint64]:
        """Raise NotRecordedError."""
        raise NotRecordedError(self.run.folder, "order digests")

    def order_digests_of(self, phase_index: int, g: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Raise NotRecordedError."""
        raise NotRecordedError(self.run.folder, "order digests")

    def digested_tokens(
        self, begin: int, end: int
    ) -> tuple[list[NDArray[np.int64]], NDArray[np.uint64]]:
        """Raise NotRecordedError."""
        raise NotRecordedError(self.run.folder, "token digests")

    def _locate(self, begin: int, end: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Return (source, drawn sample) of each of the rows [begin, end)."""
        if not 0 <= begin < end <= self.num_rows:
            raise ValueError(f"rows [{begin}, {end}) are not within the run's {self.num_rows}")
        if self._blend is None:
            return np.zeros(end - begin, dtype=np.int16), np.arange(begin, end, dtype=np.int64)
        drawn_from, drawn = self._blend.dataset[begin:end], self._blend.sample[begin:end]
        sizes = np.array([dataset.tables.num_samples for dataset in self._datasets.values()])
        wrong = (drawn_from < 0) | (drawn_from >= len(sizes))
        wrong |= (drawn < 0) | (drawn >= sizes[np.where(wrong, 0, drawn_from)])
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(
                f"{self._blend.description.path('dataset_index')}: row {begin + row} is sample "
                f"{drawn[row]} of corpus {drawn_from[row]}, which does not exist"
            )
        return drawn_from, drawn

    def _rows_drawn_from(self, source: str) -> NDArray[np.int64]:
        """Return the rows at which samples 0, 1, 2, ... of a source are drawn; 8 bytes each."""
        if source not in self._drawn_at:
            assert self._blend is not None
            number = self.source_names.index(source)
            rows = np.flatnonzero(self._blend.dataset[: self.num_rows] == number)
            if not np.array_equal(self._blend.sample[rows], np.arange(len(rows))):
                raise ValueError(
                    f"{self._blend.description.path('dataset_sample_index')}: the samples of "
                    f"{source!r} are not drawn in order, as Megatron's blends are"
                )
            self._drawn_at[source] = rows
        return self._drawn_at[source]
