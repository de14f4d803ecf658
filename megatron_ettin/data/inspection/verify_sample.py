"""Tokenise a sample of a corpus' documents again, and compare with what is stored.

Raw records that are token ids already are compared as they are.
"""

from __future__ import annotations

from collections import defaultdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_ettin.data.inspection.check import CorpusCheck
from megatron_ettin.data.inspection.raw_text import RecordContent, contents_at, find_raw_file
from megatron_ettin.data.provenance import GROUP_DOCUMENTS, Provenance
from megatron_ettin.data.tokenize import Tokenizer
from megatron_ettin.native import TokenFile

SMALL_SAMPLE = 0.001
#: Documents of a shard that are compared, however small the share is.
FEWEST = 10
COLUMNS = ("ordinal", "id", "sha256", "shard", "line")


class SampleCheck:
    """Check of a sample; shards are added one after the other."""

    def __init__(self, tokenizer: Tokenizer | None, share: float, sources: Path | None) -> None:
        """Take the tokenizer (None: only hash texts), the share, and where the raw files are."""
        self.check = CorpusCheck(name="texts")
        self._tokenizer = tokenizer
        self._sep = None if tokenizer is None else tokenizer.ids.sep
        self._share = share
        self._sources = sources
        self._appends_sep: bool | None = None
        if tokenizer is None:
            self.check.notes.append("token ids: no tokenizer is given (--tokenizer)")

    def forget_tokenizer(self) -> None:
        """Compare no more ids: the tokenizer is another one than the corpus'."""
        if self._tokenizer is not None:
            self._tokenizer = None
            self.check.notes.append("token ids: the tokenizer is another one")

    def add(self, shard: str, provenance: Provenance, field: str, appends_sep: bool | None) -> None:
        """Compare a sample of a shard; ValueError, OSError where the shard cannot be read.

        `field` is the field of the raw records. `appends_sep` tells whether documents end with
        [SEP]; None: the first document that is compared shows it.
        """
        self._appends_sep = appends_sep
        file = TokenFile(shard, check=False)
        rows = provenance.documents(choose(provenance, self._share), COLUMNS).to_pylist()
        by_file: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        for row in rows:
            by_file[row["shard"]][row["line"]] = row
        for name, documents in tqdm(
            by_file.items(), desc="tokenising a sample", unit=" files", leave=False, disable=None
        ):
            path = find_raw_file(name, self._sources)
            if path is None:
                what = f"{name}: no such file here (--sources), {len(documents)} documents"
                self.check.skip(what, len(documents))
                continue
            with self.check.faults_of():
                self._compare_file(path, documents, file, field)

    def _compare_file(
        self, path: Path, documents: dict[int, dict[str, Any]], file: TokenFile, field: str
    ) -> None:
        missing = set(documents)
        for line, content in contents_at(path, documents.keys(), field):
            missing.discard(line)
            row = documents[line]
            where = f"{file.prefix}: document {row['ordinal']} ({path}:{line}, id {row['id']})"
            self.check.compared += 1
            if sha256(_hashed_bytes(content)).digest() != row["sha256"]:
                self.check.fail(f"{where}: the raw record has another SHA-256 than recorded")
            elif not isinstance(content, str):
                self._compare_ids(where, content, file.tokens(row["ordinal"]), "raw file")
            elif self._tokenizer is not None:
                (ids,) = self._tokenizer.encode_batch([content])
                self._compare_ids(where, ids, file.tokens(row["ordinal"]), "text")
        for line in sorted(missing):
            self.check.compared += 1
            ordinal = documents[line]["ordinal"]
            self.check.fail(f"{path}:{line}: no record, but document {ordinal} came from it")

    def _compare_ids(
        self, where: str, ids: NDArray[np.integer], stored: NDArray[np.int64], origin: str
    ) -> None:
        """Compare the ids that a text or a raw file gives with those of the corpus."""
        if self._appends_sep is None and self._sep is not None:
            # Earlier versions did not record --append-eod; it holds for all documents or for none.
            self._appends_sep = len(stored) == len(ids) + 1 and stored[-1] == self._sep
        if self._appends_sep and self._sep is not None:
            ids = np.append(ids, self._sep)
        if len(ids) != len(stored):
            what = f"{len(stored)} tokens are stored, the {origin} gives {len(ids)}"
            self.check.fail(f"{where}: {what}")
            return
        differing = np.flatnonzero(ids != stored)
        if len(differing):
            at = differing[0]
            self.check.fail(f"{where}: token {at} is {stored[at]}, the {origin} gives {ids[at]}")


def choose(provenance: Provenance, share: float) -> NDArray[np.int64]:
    """Return the ordinals of a share of the documents, ascending: a function of their texts only.

    A document is chosen if bytes 16 to 23 of its text's SHA-256, as a big-endian fraction of 2^64,
    are below the share: the earlier ones choose validation documents, and those that are compared
    while a corpus is made. Those with the smallest ones make up FEWEST, if fewer are chosen.
    """
    threshold = share * 2.0**64
    chosen = np.empty(0, dtype=np.int64)
    smallest, smallest_keys = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint64)
    for begin in range(0, provenance.num_documents, GROUP_DOCUMENTS):
        ordinals = np.arange(begin, min(begin + GROUP_DOCUMENTS, provenance.num_documents))
        keys = _sample_keys(provenance.documents(ordinals, ["sha256"])["sha256"])
        chosen = np.concatenate([chosen, ordinals[keys < threshold]])
        smallest = np.concatenate([smallest, ordinals])
        smallest_keys = np.concatenate([smallest_keys, keys])
        best = np.argsort(smallest_keys, kind="stable")[:FEWEST]
        smallest, smallest_keys = smallest[best], smallest_keys[best]
    return np.union1d(chosen, smallest)


def _hashed_bytes(content: RecordContent) -> bytes:
    """Return the bytes whose SHA-256 the sidecar has: UTF-8, or ids as little-endian int32."""
    return content.encode() if isinstance(content, str) else content.astype("<i4").tobytes()


def _sample_keys(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    hashes = pa.concat_arrays(column.chunks)
    content = np.frombuffer(hashes.buffers()[1], np.uint8).reshape(-1, 32)
    mine = content[hashes.offset : hashes.offset + len(hashes)]
    return np.ascontiguousarray(mine[:, 16:24]).view(">u8").ravel().astype(np.uint64)
