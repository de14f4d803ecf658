"""Pools: the document ranges of sources, packed into rows, from which phases draw."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from megatron_ettin import native
from megatron_ettin.config import DataConfig, PhaseConfig
from megatron_ettin.config.data import Packing
from megatron_ettin.order.corpus_identity import CorpusIdentity, identify_corpus
from megatron_ettin.order.plans import PlanKey, open_plan, plan_path
from megatron_ettin.order.spec import PoolSpec


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

    def __init__(self, data: DataConfig) -> None:
        """Open the sources.

        Raises:
            OSError, ValueError: a source that is missing, damaged, or there twice.
        """
        self.data = data
        self.files: dict[str, native.TokenFile] = {}
        self.identities: dict[str, CorpusIdentity] = {}
        self.plans: dict[Pool, native.RowPlan] = {}
        self.plan_paths: dict[Pool, Path] = {}
        folder = None if data.plan_dir is None else Path(data.plan_dir)
        for name, source in data.sources.items():
            self.identities[name] = identify_corpus(source.prefix, folder=folder)
            # The identity was computed from a fully checked file, so no start checks it again.
            self.files[name] = native.TokenFile(source.prefix, check=False)
        if not data.allow_duplicates:
            _refuse_duplicates(self.identities)

    def add(self, phase: PhaseConfig, name: str) -> Pool:
        """Return the pool of a source for a phase; pack it unless an earlier phase did.

        Raises:
            ValueError: the pool is empty, or an earlier phase packed its documents differently.
        """
        documents = self.files[name].num_documents
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
            self.plans[pool] = self._open_plan(pool)
        if self.plans[pool].num_rows == 0:
            raise ValueError(
                f"phase {phase.name!r}: source {name!r} ({self.data.sources[name].prefix}) has no "
                f"documents in [{pool.first_document}, {pool.end_document}) of its {documents}"
            )
        return pool

    def describe(self, pool: Pool, quota: int, drawn: int) -> PoolSpec:
        """Return the entry of a pool for a phase in order.json."""
        identity, source = self.identities[pool.source], self.data.sources[pool.source]
        plan = self.plans[pool]
        return PoolSpec(
            source=pool.source,
            documents_in_file=identity.documents,
            tokens_in_file=identity.tokens,
            lengths_sha256=identity.lengths_sha256,
            tokens_sha256=identity.tokens_sha256,
            first_document=pool.first_document,
            end_document=pool.end_document,
            specials=source.specials,
            min_doc_tokens=source.min_doc_tokens,
            quota=quota,
            rows=plan.num_rows,
            tokens=plan.num_tokens,
            drawn=drawn,
        )

    def _open_plan(self, pool: Pool) -> native.RowPlan:
        source = self.data.sources[pool.source]
        key = PlanKey(
            lengths_sha256=self.identities[pool.source].lengths_sha256,
            first_document=pool.first_document,
            end_document=pool.end_document,
            seq_length=pool.seq_length,
            pack=pool.pack,
            specials=source.specials,
            min_doc_tokens=source.min_doc_tokens,
            max_segments_per_row=pool.max_segments_per_row,
        )
        folder = Path(self.data.plan_dir or f"{source.prefix}.plans")
        self.plan_paths[pool] = plan_path(key, folder, self.data.plans)
        return open_plan(self.files[pool.source], key, folder, self.data.plans)

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


def _refuse_duplicates(identities: Mapping[str, CorpusIdentity]) -> None:
    first_with: dict[tuple[str, str], str] = {}
    for name, identity in identities.items():
        other = first_with.setdefault(identity.content, name)
        if other != name:
            raise ValueError(
                f"data.sources: {other!r} and {name!r} hold the same documents, which would be "
                f"drawn twice as often as the blend says: drop one, or set "
                f"data.allow_duplicates: true"
            )
