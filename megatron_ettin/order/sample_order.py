"""Lookups in the sample order: from a row number g to source, documents and tokens, and back.

The number decides the source (blend table) and the draw in it; the draw decides epoch and row of
the source's pool (keyed permutation); the pool's plan lists the documents of that row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ettin import native
from megatron_ettin.config import DataConfig, PhaseConfig
from megatron_ettin.order.blend import blend_quotas
from megatron_ettin.order.order import OrderPhase
from megatron_ettin.order.pieces import Pieces, in_row_order, pieces_of_source
from megatron_ettin.order.pools import Pool, Pools
from megatron_ettin.order.spec import FORMAT, OrderSpec, PhaseSpec, PoolSpec
from megatron_ettin.rows import Rows, Specials, TokenIds


class SampleOrder:
    """Rows by number g: a pure function of the specification, independent of ranks and batches."""

    def __init__(
        self,
        *,
        phases: Sequence[PhaseConfig],
        data: DataConfig,
        seed: int,
        tokenizer_sha256: str,
        ids: TokenIds,
        recorded: OrderSpec | None = None,
    ) -> None:
        """Open the sources, pack the pools and fix the length of every phase.

        `recorded` is the order of a run that goes on: its phases draw no shard that came later.

        Raises:
            OSError: a corpus or a plan that cannot be read or written.
            ValueError: a pool is empty, a source is drawn more often than its max_epochs, or a
                phase would silently repeat documents of another; the message names phase and
                source.
        """
        self.ids = ids
        self._pools = Pools(data, recorded)
        self._drawn: dict[Pool, int] = {}
        self._phase_pools: list[list[Pool]] = []
        self._phase_orders: list[native.PhaseOrder] = []
        specs: list[PhaseSpec] = []
        for phase in phases:
            start_g = specs[-1].end_g if specs else 0
            specs.append(self._add_phase(phase, data.blend[phase.name], seed, start_g))
        self.spec = OrderSpec(
            seed=seed,
            tokenizer_sha256=tokenizer_sha256,
            phases=tuple(specs),
            shards=self._pools.shards(),
        )

    @property
    def format(self) -> str:
        """Name of the format of `order.json`."""
        return FORMAT

    @property
    def num_rows(self) -> int:
        """Rows of all phases."""
        return self.spec.num_rows

    @property
    def vocab_size(self) -> int:
        """Number of the tokenizer's ids."""
        return self.ids.vocab_size

    @cached_property
    def phases(self) -> tuple[OrderPhase, ...]:
        """Phases in the order of their rows."""
        return tuple(
            OrderPhase(
                name=phase.name,
                start_g=phase.start_g,
                end_g=phase.end_g,
                seq_length=phase.seq_length,
                phase_id=phase_id,
            )
            for phase, phase_id in zip(self.spec.phases, self.spec.phase_ids(), strict=True)
        )

    def phase_at(self, g: int) -> OrderPhase:
        """Return the phase of row `g`; ValueError if the order has no such row."""
        return self.phases[self.spec.phase_index(g)]

    def seq_length(self, g: int) -> int:
        """Return the slots of row `g`."""
        return self.phase_at(g).seq_length

    @property
    def source_names(self) -> list[str]:
        """Names of the sources; `Pieces.source` counts in this list."""
        return self._pools.source_names

    def prefixes(self, source: str) -> list[str]:
        """Return the path of each shard of a source's corpus, without suffix."""
        return list(self._pools.corpus(source).prefixes)

    def corpus(self, source: str) -> native.TokenCorpus:
        """Return a source's corpus."""
        return self._pools.corpus(source).content

    def content_id(self, source: str) -> str:
        """Return the SHA-256 of a source's .bin, or of those of its shards, hexadecimal."""
        return self._pools.corpus(source).tokens_sha256

    def shortest_document(self, source: str) -> int:
        """Return the tokens that a document of a source needs to be packed at all, at least 1."""
        return max(1, self._pools.data.sources[source].min_doc_tokens)

    def plans(self, phase_index: int) -> Iterator[tuple[PoolSpec, native.RowPlan]]:
        """Yield the pools of a phase with their row plans."""
        pools = self._phase_pools[phase_index]
        for spec, pool in zip(self.spec.phases[phase_index].pools, pools, strict=True):
            yield spec, self._pools.plans[pool]

    def plan_paths(self) -> set[Path]:
        """Return the files of all plans."""
        return set(self._pools.plan_paths.values())

    def rows(self, phase_index: int, g: NDArray[np.int64]) -> Rows:
        """Return the rows `g` [m] of one phase; `-1` marks an idle row."""
        phase = self.spec.phases[phase_index]
        pools = self._phase_pools[phase_index]
        source_index, _, rows = self._locate(phase_index, g)
        packed = native.assemble_rows(
            [self._pools.plans[pool] for pool in pools],
            source_index,
            rows,
            seq_length=phase.seq_length,
            max_segments_per_row=phase.max_segments_per_row,
            cls_id=self.ids.cls,
            sep_id=self.ids.sep,
            pad_id=self.ids.pad,
        )
        if packed.tokens.max() >= self.ids.vocab_size:
            self._refuse_token(phase, pools, source_index, rows, packed.tokens)
        return Rows(
            g=g,
            tokens=packed.tokens,
            position_ids=packed.position_ids,
            cu_seqlens=packed.cu_seqlens,
            segment_kind=packed.segment_kind,
            num_tokens=packed.num_tokens,
            seq_length=phase.seq_length,
            specials=self._specials(phase_index),
        )

    def row_tokens(self, begin: int, end: int) -> NDArray[np.int64]:
        """Return the number of tokens of each of the rows [begin, end), read from the plans."""
        counts = np.zeros(end - begin, dtype=np.int64)
        for phase_index, g in self._by_phase(begin, end):
            source_index, _, rows = self._locate(phase_index, g)
            for index, pool in enumerate(self._phase_pools[phase_index]):
                here = np.flatnonzero(source_index == index)
                counts[g[here] - begin] = self._pools.plans[pool].row_tokens(rows[here])
        return counts

    def pieces(self, begin: int, end: int) -> Pieces:
        """Return which tokens of which documents make up the rows [begin, end)."""
        parts = [part for index, g in self._by_phase(begin, end) for part in self._pieces(index, g)]
        return in_row_order(parts) if len(parts) > 1 else parts[0]

    def tokens(self, begin: int, end: int) -> list[NDArray[np.int64]]:
        """Return the unmasked tokens of each of the rows [begin, end), padding left out."""
        return [
            row
            for phase_index, g in self._by_phase(begin, end)
            for row in _without_padding(self.rows(phase_index, g))
        ]

    def where(self, source: str, document: int) -> NDArray[np.int64]:
        """Return every row of the run, ascending, that holds a part of a document.

        Raises:
            IndexError: the source has no such document.
        """
        num_documents = self.corpus(source).num_documents
        if not 0 <= document < num_documents:
            raise IndexError(
                f"source {source!r} has documents 0 to {num_documents - 1}, not {document}"
            )
        rows_of_phases = [np.empty(0, dtype=np.int64)]
        for phase_index, phase in enumerate(self.spec.phases):
            for index, pool in enumerate(self._phase_pools[phase_index]):
                if pool.source != source:
                    continue
                if pool.first_document <= document < pool.end_document:
                    rows = self._pools.plans[pool].find(document)
                    rows_of_phases.append(phase.start_g + self._drawn_at(phase_index, index, rows))
        return np.sort(np.concatenate(rows_of_phases))

    def drawn_before(self, g: int) -> Iterator[tuple[PoolSpec, int]]:
        """Yield the pools of the phases begun before row g, and the rows of them drawn by then."""
        for phase, order in zip(self.spec.phases, self._phase_orders, strict=True):
            if phase.start_g < g:
                counts = order.drawn_after(min(g, phase.end_g) - phase.start_g).tolist()
                yield from zip(phase.pools, counts, strict=True)

    def order_digests(self, begin: int, end: int) -> NDArray[np.uint64]:
        """Return [m, 2]: the order digest of each of the rows [begin, end), low lane first."""
        parts = [self.order_digests_of(i, g) for i, g in self._by_phase(begin, end)]
        return np.concatenate(parts)

    def order_digests_of(self, phase_index: int, g: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return [m, 2]: the order digests of the rows `g` [m] of one phase, 0 where idle."""
        pools = self._phase_pools[phase_index]
        source_index, epochs, rows = self._locate(phase_index, g)
        return native.order_digests(
            [self._pools.plans[pool] for pool in pools],
            g,
            np.array([pool.source_id for pool in pools], dtype=np.uint64),
            source_index,
            epochs,
            rows,
        )

    def digested_tokens(
        self, begin: int, end: int
    ) -> tuple[list[NDArray[np.int64]], NDArray[np.uint64]]:
        """Return the tokens of the rows [begin, end), and [m, 2] the digest of those tokens.

        Both come from one read of the corpora, so that the digest speaks of what is returned.
        """
        tokens, digests = [], []
        for phase_index, g in self._by_phase(begin, end):
            rows = self.rows(phase_index, g)
            tokens += _without_padding(rows)
            digests.append(
                native.token_digests(
                    g, rows.tokens, rows.cu_seqlens, rows.num_tokens, rows.seq_length
                )
            )
        return tokens, np.concatenate(digests)

    def _by_phase(self, begin: int, end: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        if not 0 <= begin < end <= self.num_rows:
            raise ValueError(f"rows [{begin}, {end}) are not within the order's {self.num_rows}")
        for phase_index, phase in enumerate(self.spec.phases):
            first, last = max(begin, phase.start_g), min(end, phase.end_g)
            if first < last:
                yield phase_index, np.arange(first, last, dtype=np.int64)

    def _pieces(self, phase_index: int, g: NDArray[np.int64]) -> Iterator[Pieces]:
        """Yield the pieces of the rows `g` [m], m > 0, of one phase, source by source."""
        names = self.source_names
        source_index, epochs, rows = self._locate(phase_index, g)
        for index, pool in enumerate(self._phase_pools[phase_index]):
            here = np.flatnonzero(source_index == index)
            if not len(here):  # the rule where a question asks for one row
                continue
            planned = self._pools.plans[pool].pieces(rows[here])
            of_row = np.repeat(here, np.diff(planned.splits))
            yield pieces_of_source(
                g=g[of_row],
                source=names.index(pool.source),
                epoch=epochs[of_row],
                row=rows[of_row],
                document=planned.document,
                offset=planned.offset,
                length=planned.length,
                slots=planned.length + planned.cls + planned.sep,
                ends_document=planned.ends_document,
            )

    def _locate(
        self, phase_index: int, g: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """Return (index of the pool, epoch, row of the pool) of the rows `g` [m]; -1 where idle."""
        phase = self.spec.phases[phase_index]
        used = g >= 0
        if np.any(used & ((g < phase.start_g) | (g >= phase.end_g))):
            raise ValueError(
                f"rows {g.min()}..{g.max()} leave phase {phase.name!r}, which is rows "
                f"[{phase.start_g}, {phase.end_g})"
            )
        source_index = np.full(len(g), -1, dtype=np.int32)
        epochs = np.full(len(g), -1, dtype=np.int64)
        rows = np.full(len(g), -1, dtype=np.int64)
        source_index[used], epochs[used], rows[used] = self._phase_orders[phase_index].locate(
            g[used] - phase.start_g
        )
        return source_index, epochs, rows

    def _drawn_at(self, phase_index: int, index: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row numbers of a phase at which rows of one of its pools are drawn."""
        order, phase = self._phase_orders[phase_index], self.spec.phases[phase_index]
        pool = phase.pools[index]
        end = int(order.drawn_after(phase.num_rows)[index])
        # A pool's row comes once in each epoch. The phase enters the first epoch where earlier
        # phases left the pool, and may leave the last one early: `find` gives all draws, of which
        # those outside the phase are dropped.
        epochs = np.arange(pool.drawn // pool.rows, -(-end // pool.rows), dtype=np.int64)
        every_row = np.tile(rows, len(epochs))
        source_index = np.full(len(every_row), index, dtype=np.int32)
        n = order.find(source_index, np.repeat(epochs, len(rows)), every_row)
        return n[(n >= 0) & (n < phase.num_rows)]

    def _refuse_token(
        self,
        phase: PhaseSpec,
        pools: Sequence[Pool],
        source_index: NDArray[np.int32],
        rows: NDArray[np.int64],
        tokens: NDArray[np.int64],
    ) -> None:
        """Raise ValueError naming the corpus and the document that hold an unknown token id."""
        # `tokens` are the rows end to end, so the position tells the row.
        position = int(np.argmax(tokens >= self.ids.vocab_size))
        row_in_batch = position // phase.seq_length
        pool = pools[source_index[row_in_batch]]
        corpus = self._pools.corpus(pool.source)
        pieces = self._pools.plans[pool].pieces(rows[row_in_batch : row_in_batch + 1])
        for document in pieces.document.tolist():
            ids = corpus.content.tokens(document)
            if ids.max() >= self.ids.vocab_size:
                prefix, number = corpus.shard_of(document)
                raise ValueError(
                    f"{prefix}.bin: document {number} holds token id "
                    f"{int(ids.max())}, but the tokenizer has {self.ids.vocab_size} ids; "
                    f"preprocess the corpus with this tokenizer"
                )

    def _specials(self, phase_index: int) -> Specials:
        rules = {pool.specials for pool in self.spec.phases[phase_index].pools}
        (rule,) = rules
        return rule

    def _add_phase(
        self, phase: PhaseConfig, weights: Mapping[str, float], seed: int, start_g: int
    ) -> PhaseSpec:
        sources = self._pools.data.sources
        if len({sources[name].specials for name in weights}) > 1:
            raise ValueError(
                f"phase {phase.name!r}: its sources disagree on `specials`; a phase needs one rule"
            )
        pools = [self._pools.add(phase, name) for name in weights]
        quotas = blend_quotas(list(weights.values()))
        # A phase goes on in each pool where earlier phases left it: no row repeats too early.
        drawn = [self._drawn.get(pool, 0) for pool in pools]
        order = native.PhaseOrder(
            seed=seed,
            source_ids=[pool.source_id for pool in pools],
            quotas=quotas,
            rows=[self._pools.plans[pool].num_rows for pool in pools],
            drawn=drawn,
        )
        specs = tuple(
            self._pools.describe(pool, quota, count)
            for pool, quota, count in zip(pools, quotas, drawn, strict=True)
        )
        # Rows of a source differ in fill, so the length follows from the blend's mean row.
        num_rows = phase.train_rows or -(-phase.train_tokens // _mean_row_tokens(specs))
        drawn_after = order.drawn_after(num_rows).tolist()
        for pool, spec, count in zip(pools, specs, drawn_after, strict=True):
            _check_epochs(phase.name, spec, count, sources[pool.source].max_epochs)
            self._drawn[pool] = count
        self._phase_pools.append(pools)
        self._phase_orders.append(order)
        return PhaseSpec(
            name=phase.name,
            start_g=start_g,
            num_rows=num_rows,
            seq_length=phase.seq_length,
            max_segments_per_row=phase.segments_per_row,
            pack=phase.pack,
            pools=specs,
        )


def _check_epochs(phase: str, pool: PoolSpec, drawn: int, max_epochs: float | None) -> None:
    if max_epochs is not None and drawn > Fraction(str(max_epochs)) * pool.rows:
        raise ValueError(
            f"phase {phase!r}: source {pool.source!r} would be drawn {drawn / pool.rows:.3f} times "
            f"({drawn} rows of {pool.rows}), more than its max_epochs {max_epochs}: train on fewer "
            f"tokens, lower its weight, or add documents"
        )


def _without_padding(rows: Rows) -> list[NDArray[np.int64]]:
    by_row = rows.tokens.reshape(len(rows.g), rows.seq_length)
    return [row[:count] for row, count in zip(by_row, rows.num_tokens, strict=True)]


def _mean_row_tokens(pools: Sequence[PoolSpec]) -> Fraction:
    period = sum(pool.quota for pool in pools)
    return sum((Fraction(p.quota * p.tokens, period * p.rows) for p in pools), Fraction(0))
