"""The order at work: from a row number g to its source, its documents and its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megatron_ettin import native
from megatron_ettin.config import PhaseConfig, SourceConfig
from megatron_ettin.objectives import Rows, Specials, TokenIds
from megatron_ettin.order.spec import OrderSpec, PhaseSpec, PoolSpec


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """A pool that has been packed: its identity without the phase's quota, and its rows."""

    source: str
    first_document: int
    end_document: int
    seq_length: int
    max_segments_per_row: int

    @property
    def source_id(self) -> int:
        """Key of the pool's permutation: stable when sources are added, moved or dropped."""
        text = (
            f"{self.source}:{self.first_document}:{self.end_document}"
            f":{self.seq_length}:{self.max_segments_per_row}"
        )
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    def overlaps(self, other: _Pool) -> bool:
        """Tell whether the two pack some of the same documents differently."""
        return (
            self != other
            and self.source == other.source
            and self.first_document < other.end_document
            and other.first_document < self.end_document
        )


class SampleOrder:
    """Rows by number: a pure function of the specification, whatever the world looks like."""

    def __init__(
        self,
        *,
        phases: Sequence[PhaseConfig],
        sources: Mapping[str, SourceConfig],
        blend: Mapping[str, Mapping[str, float]],
        pools: Mapping[str, tuple[float, float]],
        seed: int,
        tokenizer_sha256: str,
        ids: TokenIds,
    ) -> None:
        """Open the sources, pack the pools and fix the length of every phase.

        Raises:
            ValueError: naming the phase and source when a pool is empty, or when a phase would
                silently repeat another's documents.
        """
        self.ids = ids
        self._sources = dict(sources)
        self._files = {name: native.TokenFile(source.prefix) for name, source in sources.items()}
        self._lengths_sha256 = {
            name: hashlib.sha256(file.lengths.astype("<i8").tobytes()).hexdigest()
            for name, file in self._files.items()
        }
        self._plans: dict[_Pool, native.RowPlan] = {}
        self._drawn: dict[_Pool, int] = {}
        self._phase_pools: list[list[_Pool]] = []
        self._phase_orders: list[native.PhaseOrder] = []
        specs: list[PhaseSpec] = []
        for phase in phases:
            start_g = specs[-1].end_g if specs else 0
            specs.append(
                self._add_phase(phase, blend[phase.name], pools.get(phase.name), seed, start_g)
            )
        self.spec = OrderSpec(seed=seed, tokenizer_sha256=tokenizer_sha256, phases=tuple(specs))

    def rows(self, phase_index: int, g: NDArray[np.int64]) -> Rows:
        """Return the rows `g` [m] of one phase, with -1 for idle slots."""
        phase = self.spec.phases[phase_index]
        pools = self._phase_pools[phase_index]
        slots, rows = self._locate(phase_index, g)
        tokens, position_ids, cu_seqlens, kinds, num_tokens = native.assemble_rows(
            [self._files[pool.source] for pool in pools],
            [self._plans[pool] for pool in pools],
            slots,
            rows,
            seq_length=phase.seq_length,
            max_segments_per_row=phase.max_segments_per_row,
            cls_id=self.ids.cls,
            sep_id=self.ids.sep,
            pad_id=self.ids.pad,
        )
        if tokens.max() >= self.ids.vocab_size:
            self._refuse_token(phase, pools, slots, rows, tokens)
        return Rows(
            g=g,
            tokens=tokens,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            segment_kind=kinds,
            num_tokens=num_tokens,
            seq_length=phase.seq_length,
            specials=self._specials(phase_index),
        )

    def count_tokens(self, begin: int, end: int) -> int:
        """Return the tokens of rows [begin, end) of one phase, without reading them."""
        phase_index = self.spec.phase_index(begin)
        slots, rows = self._locate(phase_index, np.arange(begin, end, dtype=np.int64))
        total = 0
        for slot, pool in enumerate(self._phase_pools[phase_index]):
            total += int(self._plans[pool].row_tokens[rows[slots == slot]].sum())
        return total

    def fill(self, phase_index: int) -> float:
        """Return the share of a phase's slots that hold tokens, expected from its blend."""
        phase = self.spec.phases[phase_index]
        return float(_mean_row_tokens(phase.pools) / phase.seq_length)

    def _locate(
        self, phase_index: int, g: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        phase = self.spec.phases[phase_index]
        used = g >= 0
        if np.any(used & ((g < phase.start_g) | (g >= phase.end_g))):
            raise ValueError(
                f"rows {g.min()}..{g.max()} leave phase {phase.name!r}, which is rows "
                f"[{phase.start_g}, {phase.end_g})"
            )
        slots = np.full(len(g), -1, dtype=np.int32)
        rows = np.full(len(g), -1, dtype=np.int64)
        slots[used], _, rows[used] = self._phase_orders[phase_index].locate(g[used] - phase.start_g)
        return slots, rows

    def _refuse_token(
        self,
        phase: PhaseSpec,
        pools: Sequence[_Pool],
        slots: NDArray[np.int32],
        rows: NDArray[np.int64],
        tokens: NDArray[np.int64],
    ) -> None:
        """Raise ValueError naming the corpus and the document that hold an unknown token id."""
        position = int(np.argmax(tokens >= self.ids.vocab_size))
        slot = position // phase.seq_length
        pool = pools[slots[slot]]
        file = self._files[pool.source]
        documents = self._plans[pool].segments(int(rows[slot]))[0]
        for document in documents.tolist():
            ids = file.tokens(document)
            if ids.max() >= self.ids.vocab_size:
                raise ValueError(
                    f"{self._sources[pool.source].prefix}.bin: document {document} holds token id "
                    f"{int(ids.max())}, but the tokenizer has {self.ids.vocab_size} ids; "
                    f"preprocess the corpus with this tokenizer"
                )

    def _specials(self, phase_index: int) -> Specials:
        rules = {self._sources[p.source].specials for p in self._phase_pools[phase_index]}
        (rule,) = rules
        return rule

    def _add_phase(
        self,
        phase: PhaseConfig,
        weights: Mapping[str, float],
        share: tuple[float, float] | None,
        seed: int,
        start_g: int,
    ) -> PhaseSpec:
        names = list(weights)
        if len({self._sources[name].specials for name in names}) > 1:
            raise ValueError(
                f"phase {phase.name!r}: its sources disagree on `specials`; a phase needs one rule"
            )
        pools = [self._pack(phase, name, share or (0.0, 1.0)) for name in names]
        quotas = native.blend_quotas([weights[name] for name in names])
        drawn = [self._drawn.get(pool, 0) for pool in pools]
        order = native.PhaseOrder(
            seed=seed,
            source_ids=[pool.source_id for pool in pools],
            quotas=quotas,
            rows=[self._plans[pool].num_rows for pool in pools],
            drawn=drawn,
        )
        specs = tuple(
            self._pool_spec(pool, quota, count)
            for pool, quota, count in zip(pools, quotas, drawn, strict=True)
        )
        num_rows = -(-phase.train_tokens // _mean_row_tokens(specs))
        for pool, count in zip(pools, order.drawn_after(num_rows).tolist(), strict=True):
            self._drawn[pool] = count
        self._phase_pools.append(pools)
        self._phase_orders.append(order)
        return PhaseSpec(
            name=phase.name,
            start_g=start_g,
            num_rows=num_rows,
            seq_length=phase.seq_length,
            max_segments_per_row=phase.segments_per_row,
            pack="bfd",
            pools=specs,
        )

    def _pack(self, phase: PhaseConfig, name: str, share: tuple[float, float]) -> _Pool:
        file = self._files[name]
        pool = _Pool(
            source=name,
            first_document=int(Fraction(str(share[0])) * file.num_documents),
            end_document=int(Fraction(str(share[1])) * file.num_documents),
            seq_length=phase.seq_length,
            max_segments_per_row=phase.segments_per_row,
        )
        if not phase.allow_repeats:
            for other in self._plans:
                if pool.overlaps(other):
                    raise ValueError(
                        f"phase {phase.name!r} packs documents [{pool.first_document}, "
                        f"{pool.end_document}) of source {name!r} into rows of "
                        f"{pool.seq_length}, but documents [{other.first_document}, "
                        f"{other.end_document}) were packed into rows of {other.seq_length} "
                        f"before: declare disjoint `data.pools`, or `allow_repeats: true`"
                    )
        if pool not in self._plans:
            self._plans[pool] = native.RowPlan(
                file.lengths,
                pool.first_document,
                pool.end_document,
                pool.seq_length,
                specials=self._sources[name].specials,
                min_doc_tokens=self._sources[name].min_doc_tokens,
                max_segments_per_row=pool.max_segments_per_row,
            )
        if self._plans[pool].num_rows == 0:
            raise ValueError(
                f"phase {phase.name!r}: source {name!r} ({self._sources[name].prefix}) has no "
                f"documents in [{pool.first_document}, {pool.end_document}) of its "
                f"{file.num_documents}"
            )
        return pool

    def _pool_spec(self, pool: _Pool, quota: int, drawn: int) -> PoolSpec:
        file, source, plan = self._files[pool.source], self._sources[pool.source], self._plans[pool]
        return PoolSpec(
            source=pool.source,
            documents_in_file=file.num_documents,
            tokens_in_file=file.num_tokens,
            lengths_sha256=self._lengths_sha256[pool.source],
            first_document=pool.first_document,
            end_document=pool.end_document,
            specials=source.specials,
            min_doc_tokens=source.min_doc_tokens,
            quota=quota,
            rows=plan.num_rows,
            tokens=plan.num_tokens,
            drawn=drawn,
        )


def _mean_row_tokens(pools: Sequence[PoolSpec]) -> Fraction:
    period = sum(pool.quota for pool in pools)
    return sum((Fraction(p.quota * p.tokens, period * p.rows) for p in pools), Fraction(0))
