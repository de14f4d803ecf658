"""Provenance of a corpus of several shards: one sidecar a shard, asked as if they were one file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megatron_ettin.data.bloom_filters import groups_that_may_hold
from megatron_ettin.data.provenance import (
    GROUP_DOCUMENTS,
    SCHEMA,
    Provenance,
    as_digest,
    sidecar_path,
)


class ShardedProvenance:
    """The sidecars of a corpus's shards; documents are numbered through.

    A sidecar is open only while it is read: a corpus may have more shards than a process files.
    """

    def __init__(self, prefixes: Sequence[str]) -> None:
        """Check the sidecar of each shard; raises as `Provenance.open`."""
        self._prefixes = list(prefixes)
        counts = [0]
        for prefix in prefixes:
            with Provenance.open(prefix) as shard:
                counts.append(shard.num_documents)
        self._begins = np.cumsum(counts, dtype=np.int64)

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return int(self._begins[-1])

    def mean_bytes(self, columns: Sequence[str]) -> float:
        """Return the bytes that these columns of a document take in memory, on average."""
        total = 0.0
        for prefix in self._prefixes:
            with Provenance.open(prefix) as shard:
                total += shard.mean_bytes(columns) * shard.num_documents
        return total / max(1, self.num_documents)

    def documents(
        self, ordinals: NDArray[np.int64], columns: Sequence[str] = SCHEMA.names
    ) -> pa.Table:
        """Return columns of the documents [n], as `Provenance.documents` does.

        Each shard that holds one of them is read once.
        """
        outside = ordinals[(ordinals < 0) | (ordinals >= self.num_documents)]
        if len(outside):
            raise IndexError(
                f"{sidecar_path(self._prefixes[0])} and those of the other shards: document "
                f"{outside[0]} of {self.num_documents}; documents are numbered from 0"
            )
        shard_of = np.searchsorted(self._begins, ordinals, side="right") - 1
        # Tables follow each other by shard; `place[i]` is where that of ordinals[i] is then.
        by_shard = np.argsort(shard_of, kind="stable")
        place = np.empty(len(ordinals), dtype=np.int64)
        place[by_shard] = np.arange(len(ordinals))

        def read(number: int) -> pa.Table:
            wanted = ordinals[shard_of == number]
            with Provenance.open(self._prefixes[number]) as shard:
                table = shard.documents(wanted - self._begins[number], columns)
            if "ordinal" in columns:
                where = table.schema.get_field_index("ordinal")
                table = table.set_column(where, SCHEMA.field("ordinal"), pa.array(wanted))
            return table

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            tables = list(threads.map(read, np.unique(shard_of).tolist()))
        tables.append(SCHEMA.empty_table().select(columns))
        return pa.concat_tables(tables).unify_dictionaries().take(pa.array(place))

    def find_id(self, document_id: str) -> NDArray[np.int64]:
        """Return the ordinals of all documents with this id, ascending."""
        return self._find("id", document_id)

    def find_sha256(self, sha256: str) -> NDArray[np.int64]:
        """Return the ordinals of all documents whose text has this SHA-256, ascending.

        ValueError where that is not 64 hexadecimal digits.
        """
        return self._find("sha256", as_digest(sha256))

    def find_text(self, text: str) -> NDArray[np.int64]:
        """Return the ordinals of all documents with exactly this text, ascending."""
        return self.find_sha256(hashlib.sha256(text.encode()).hexdigest())

    def _find(self, column: str, value: str | bytes) -> NDArray[np.int64]:
        paths = [sidecar_path(prefix) for prefix in self._prefixes]
        admitted = groups_that_may_hold(paths, column, value)

        def find(number: int) -> NDArray[np.int64]:
            with Provenance.open(self._prefixes[number]) as shard:
                found = shard.find_in(admitted[number], column, value)
            return self._begins[number] + found

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            found = list(threads.map(find, np.flatnonzero([len(a) > 0 for a in admitted]).tolist()))
        return np.concatenate([np.empty(0, dtype=np.int64), *found])


def open_provenance(prefixes: Sequence[str]) -> Provenance | ShardedProvenance:
    """Open the sidecar of a corpus, or those of its shards; raises as `Provenance.open`."""
    return Provenance.open(prefixes[0]) if len(prefixes) == 1 else ShardedProvenance(prefixes)


def find_digests(
    provenance: Provenance | ShardedProvenance, digests: Collection[bytes]
) -> NDArray[np.int64]:
    """Return the ordinals of all documents whose text has one of these SHA-256, ascending.

    One pass over the sidecar, however many they are: few documents are found faster by
    `find_sha256`.
    """
    wanted = pa.array(digests, pa.binary(32))
    found = [np.empty(0, dtype=np.int64)]
    end = provenance.num_documents if len(wanted) else 0
    for begin in range(0, end, GROUP_DOCUMENTS):
        ordinals = np.arange(begin, min(begin + GROUP_DOCUMENTS, end))
        column = provenance.documents(ordinals, ["sha256"])["sha256"]
        found.append(ordinals[pc.is_in(column, wanted).to_numpy()])
    return np.concatenate(found)
