"""A source's corpus: its shards, opened as one, with the hashes that identify them."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from megatron_ettin import native
from megatron_ettin.order.corpus_identity import CorpusIdentity, identify_corpus
from megatron_ettin.order.shard_list import list_shards
from megatron_ettin.order.spec import PoolSpec, ShardSpec, combined_sha256


class OtherShardsError(ValueError):
    """A source does not begin with the shards of the recorded order; the message names one."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One .bin/.idx pair or several, whose documents are numbered through."""

    prefixes: tuple[str, ...]
    identities: tuple[CorpusIdentity, ...]
    content: native.TokenCorpus

    @classmethod
    def open(cls, prefix: str | Sequence[str], *, folder: Path | None = None) -> Corpus:
        """Open the corpus that a configuration names; `folder` is that of stored identities.

        Raises:
            OSError, ValueError: naming the shard that is missing or damaged, or as `list_shards`.
        """
        prefixes = list_shards(prefix)
        identities = [identify_corpus(shard, folder=folder) for shard in prefixes]
        # The identity was computed from a fully checked file, so no start checks it again.
        files = [_open(shard, len(prefixes)) for shard in prefixes]
        return cls(
            prefixes=tuple(prefixes),
            identities=tuple(identities),
            content=native.TokenCorpus(files),
        )

    @property
    def documents(self) -> int:
        """Documents of all shards."""
        return self.content.num_documents

    @cached_property
    def lengths_sha256(self) -> str:
        """Hash of the lengths of all documents."""
        return combined_sha256(identity.lengths_sha256 for identity in self.identities)

    @cached_property
    def tokens_sha256(self) -> str:
        """Hash of all tokens."""
        return combined_sha256(identity.tokens_sha256 for identity in self.identities)

    @property
    def name(self) -> str:
        """Prefix of the pair, or of the first and the last, for messages."""
        first, last, count = self.prefixes[0], self.prefixes[-1], len(self.prefixes)
        return first if count == 1 else f"{first} to {last}, {count} shards"

    def shards(self) -> tuple[ShardSpec, ...]:
        """Return what `order.json` says of the shards."""
        return tuple(
            ShardSpec(
                documents=identity.documents,
                tokens=identity.tokens,
                lengths_sha256=identity.lengths_sha256,
                tokens_sha256=identity.tokens_sha256,
            )
            for identity in self.identities
        )

    def shard_of(self, document: int) -> tuple[str, int]:
        """Return the prefix of the shard that holds a document, and its number in that shard."""
        for prefix, identity in zip(self.prefixes, self.identities, strict=True):
            if document < identity.documents:
                return prefix, document
            document -= identity.documents
        raise IndexError(f"{self.name}: has {self.documents} documents")

    def first(self, count: int) -> Corpus:
        """Return the corpus of the first `count` shards."""
        if count == len(self.prefixes):
            return self
        return Corpus(
            prefixes=self.prefixes[:count],
            identities=self.identities[:count],
            content=native.TokenCorpus(self.content.shards[:count]),
        )

    def recorded_in(self, pool: PoolSpec, shards: Sequence[ShardSpec]) -> Corpus:
        """Return the corpus of the first shards, those that a recorded pool was made of.

        `shards` are those that the order of the pool lists; none if it knew one pair only. A corpus
        that is and was one pair is returned as it is: the orders are compared anyway.

        Raises:
            OtherShardsError: the first shards are not the recorded ones.
        """
        if len(self.prefixes) == 1 and not shards:
            return self
        for number, (was, prefix, now) in enumerate(
            zip(shards, self.prefixes, self.shards(), strict=False)
        ):
            if was != now:
                self._refuse(pool, f"shard {number}, {prefix}, {_difference(was, now)}")
        if len(shards) > len(self.prefixes):
            missing = f"it had {len(shards)} shards, and now has {len(self.prefixes)}"
            self._refuse(pool, f"{missing}: the last {len(shards) - len(self.prefixes)} are gone")
        ends = list(itertools.accumulate(identity.documents for identity in self.identities))
        counts = [n for n, end in enumerate(ends, start=1) if end == pool.documents_in_file]
        if not counts:
            what = f"it had {pool.documents_in_file} documents, and no first shards have as many"
            self._refuse(pool, f"{what} ({self.name}: {self.documents} documents)")
        for count in counts:
            corpus = self.first(count)
            recorded = pool.lengths_sha256, pool.tokens_sha256
            if (corpus.lengths_sha256, corpus.tokens_sha256) == recorded:
                return corpus
        of = self.first(counts[0]).name
        self._refuse(pool, f"its first {pool.documents_in_file} documents ({of}) have other hashes")

    def _refuse(self, pool: PoolSpec, what: str) -> NoReturn:
        raise OtherShardsError(
            f"source {pool.source!r}: is not the corpus of the recorded order: {what}. Restore the "
            f"recorded shards in their order (new ones come after them), or name other shards as a "
            f"source of their own"
        )


def _open(prefix: str, count: int) -> native.TokenFile:
    try:
        return native.TokenFile(prefix, check=False)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise OSError(
            error.errno,
            f"too many open files: {count} shards need {2 * count}; raise the limit (ulimit -n)",
            f"{prefix}.idx",
        ) from error


def _difference(was: ShardSpec, now: ShardSpec) -> str:
    for field in ("documents", "tokens", "lengths_sha256", "tokens_sha256"):
        if getattr(was, field) != getattr(now, field):
            return f"had {field} {getattr(was, field)}, and now has {getattr(now, field)}"
    raise AssertionError


def refuse_duplicates(corpora: Iterable[tuple[str, Corpus]]) -> None:
    """Raise ValueError if two shards, of one source or of two, hold the same documents."""
    first_with: dict[tuple[str, str], tuple[str, str]] = {}
    for name, corpus in corpora:
        for prefix, identity in zip(corpus.prefixes, corpus.identities, strict=True):
            if identity.documents == 0 and len(corpus.prefixes) > 1:
                continue
            other, its_prefix = first_with.setdefault(identity.content, (name, prefix))
            if (other, its_prefix) != (name, prefix):
                which = (
                    f"data.sources: {other!r} and {name!r}"
                    if other != name
                    else f"data.sources.{name}: two of its shards"
                )
                raise ValueError(
                    f"{which} hold the same documents ({its_prefix} and {prefix}), which would be "
                    f"drawn twice as often as the blend says: drop one, or set "
                    f"data.allow_duplicates: true"
                )
