"""Pools: the document ranges of sources, packed into rows, from which phases draw."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from megatron_ettin import native
from megatron_ettin.config import DataConfig, PhaseConfig
from megatron_ettin.config.data import Packing
from megatron_ettin.order.corpora import Corpus, refuse_duplicates
from megatron_ettin.order.plans import PlanKey, open_plan, plan_path
from megatron_ettin.order.shard_list import plans_folder
from megatron_ettin.order.spec import OrderSpec, PoolSpec, ShardSpec


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Documents [first_document, end_document) of a source in rows of one kind."""

    source: str
    first_document: int
    end_document: int
    seq_length: int
    pack: Packing
    max_segments_per_row: int

    @cached_property  # every batch asks for it, for its digests
    def source_id(self) -> int:
        """Key of the pool's permutation; it holds no position in a list, and no path.

        So it stays the same when other sources are added or dropped, or files are moved.
        """
        text = (
            f"{self.source}:{self.first_document}:{self.end_document}"
            f":{self.pack}:{self.seq_length}:{self.max_segments_per_row}"
        )
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    def overlaps(self, other: Pool) -> bool:
        """Tell whether the two pack some of the same documents differently."""
        return (
            self != other
            and self.source == other.source
            and self.first_document < other.end_document
            and other.first_document < self.end_document
        )


class Pools:
    """The sources of a run and the row plans of all pools that its phases use."""

    def __init__(self, data: DataConfig, recorded: OrderSpec | None = None) -> None:
        """Open the sources.

        A phase of the order that is `recorded` goes on to draw from the shards that it had then.

        Raises:
            OSError, ValueError: a source that is missing, damaged, or there twice.
        """
        self.data = data
        self._recorded = recorded
        self._corpora: dict[str, Corpus] = {}
        self._corpus_of: dict[Pool, Corpus] = {}
        self.plans: dict[Pool, native.RowPlan] = {}
        self.plan_paths: dict[Pool, Path] = {}
        folder = None if data.plan_dir is None else Path(data.plan_dir)
        for name, source in data.sources.items():
            self._corpora[name] = Corpus.open(source.prefix, folder=folder)
        if not data.allow_duplicates:
            refuse_duplicates(self._corpora.items())

    @property
    def source_names(self) -> list[str]:
        """Names of the sources, in the order of the configuration."""
        return list(self._corpora)

    def corpus(self, name: str) -> Corpus:
        """Return the shards of a source that its pools draw from; all if it has no pool."""
        drawn = [corpus for pool, corpus in self._corpus_of.items() if pool.source == name]
        return max(drawn, key=lambda corpus: len(corpus.prefixes), default=self._corpora[name])

    def shards(self) -> dict[str, tuple[ShardSpec, ...]]:
        """Return the shards of the sources with pools that have several."""
        drawn = dict.fromkeys(pool.source for pool in self._corpus_of)
        corpora = {name: self.corpus(name) for name in drawn}
        return {name: c.shards() for name, c in corpora.items() if len(c.prefixes) > 1}

    def add(self, phase: PhaseConfig, name: str) -> Pool:
        """Return the pool of a source for a phase; pack it unless an earlier phase did.

        Raises:
            ValueError: the pool is empty, an earlier phase packed its documents differently, or a
                recorded one had other shards.
        """
        corpus = self._corpus_for(phase.name, name)
        documents = corpus.documents
        share = self.data.pools.get(phase.name, (0.0, 1.0))
        pool = Pool(
            source=name,
            # Exact, because a float's product can fall below a whole number: int(0.29 * 100) is 28.
            first_document=int(Fraction(str(share[0])) * documents),
            end_document=int(Fraction(str(share[1])) * documents),
            seq_length=phase.seq_length,
            pack=phase.pack,
            max_segments_per_row=phase.segments_per_row,
        )
        if not phase.allow_repeats:
            self._refuse_repeats(phase.name, pool)
        if pool not in self.plans:
            self._corpus_of[pool] = corpus
            self.plans[pool] = self._open_plan(pool)
        if self.plans[pool].num_rows == 0:
            raise ValueError(
                f"phase {phase.name!r}: source {name!r} ({corpus.name}) has no "
                f"documents in [{pool.first_document}, {pool.end_document}) of its {documents}"
            )
        return pool

    def describe(self, pool: Pool, quota: int, drawn: int) -> PoolSpec:
        """Return the entry of a pool for a phase in order.json."""
        corpus, source = self._corpus_of[pool], self.data.sources[pool.source]
        plan = self.plans[pool]
        return PoolSpec(
            source=pool.source,
            documents_in_file=corpus.documents,
            tokens_in_file=corpus.content.num_tokens,
            lengths_sha256=corpus.lengths_sha256,
            tokens_sha256=corpus.tokens_sha256,
            first_document=pool.first_document,
            end_document=pool.end_document,
            specials=source.specials,
            min_doc_tokens=source.min_doc_tokens,
            quota=quota,
            rows=plan.num_rows,
            tokens=plan.num_tokens,
            drawn=drawn,
        )

    def _corpus_for(self, phase: str, name: str) -> Corpus:
        """Return the shards of a source that a phase may draw from."""
        corpus, recorded = self._corpora[name], self._recorded
        if recorded is None:
            return corpus
        of_phase = next((other for other in recorded.phases if other.name == phase), None)
        pools = of_phase.pools if of_phase is not None else ()
        pool = next((pool for pool in pools if pool.source == name), None)
        if pool is None:
            return corpus
        return corpus.recorded_in(pool, recorded.shards.get(name, ()))

    def _open_plan(self, pool: Pool) -> native.RowPlan:
        source, corpus = self.data.sources[pool.source], self._corpus_of[pool]
        key = PlanKey(
            lengths_sha256=corpus.lengths_sha256,
            first_document=pool.first_document,
            end_document=pool.end_document,
            seq_length=pool.seq_length,
            pack=pool.pack,
            specials=source.specials,
            min_doc_tokens=source.min_doc_tokens,
            max_segments_per_row=pool.max_segments_per_row,
        )
        folder = Path(self.data.plan_dir or plans_folder(source.prefix))
        self.plan_paths[pool] = plan_path(key, folder, self.data.plans)
        return open_plan(corpus.content, key, folder, self.data.plans)

    def _refuse_repeats(self, phase: str, pool: Pool) -> None:
        for other in self.plans:
            if pool.overlaps(other):
                raise ValueError(
                    f"phase {phase!r} packs documents [{pool.first_document}, "
                    f"{pool.end_document}) of source {pool.source!r} into rows of "
                    f"{pool.seq_length} ({pool.pack}), but documents [{other.first_document}, "
                    f"{other.end_document}) were packed into rows of {other.seq_length} "
                    f"({other.pack}) before: declare disjoint `data.pools`, or "
                    f"`allow_repeats: true`"
                )
