"""Search for documents whose raw text contains a text: a pass over a source's raw files.

The files and the field come from the corpus' own record, and the SHA-256 of a text leads from the
raw file to the document. So the time is that of reading the raw files once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from megatron_ettin.data.inspection.raw_text import find_raw_file
from megatron_ettin.data.inspection.shards import read_shard_summary, text_field
from megatron_ettin.data.provenance import GROUP_DOCUMENTS, Provenance
from megatron_ettin.data.raw_files import BadRecord, RawFile, TextBatch, read_batches
from megatron_ettin.data.sharded_provenance import ShardedProvenance, find_digests


class Hits(NamedTuple):
    """Result of a search in one source."""

    ordinals: list[int]
    """Documents of the corpus that contain the text, ascending."""
    raw_documents: int
    """Raw documents that contain it, those that are not in the corpus included."""


def find_containing(
    text: str,
    prefixes: Sequence[str],
    provenance: Provenance | ShardedProvenance,
    root: Path | None,
) -> Hits:
    """Return the documents of a corpus that contain a text, letter by letter.

    `root` is the folder of the raw files, if they were moved. A progress bar counts documents.

    Raises:
        FileNotFoundError: a raw file is gone; no file is read then.
        ValueError: the text is empty, or a raw file holds token ids or is damaged.
    """
    if not text:
        raise ValueError("--contains: the text is empty")
    files, field = _raw_files(provenance, root), _field_of(prefixes)
    digests: list[bytes] = []
    count = provenance.num_documents
    with tqdm(total=count, desc="searching", unit=" documents", unit_scale=True, disable=None) as b:
        for file in files:
            for texts in _texts(file, field):
                found = (each for each in texts if text in each)
                digests += [hashlib.sha256(each.encode()).digest() for each in found]
                b.update(len(texts))
    return Hits(find_digests(provenance, set(digests)).tolist(), len(digests))


def _texts(file: RawFile, field: str) -> Iterator[list[str]]:
    """Yield the texts of a raw file in batches; records that are no documents are passed over.

    Raises:
        ValueError: no record of the file is a document, or they are token ids.
    """
    bad: list[BadRecord] = []
    count = 0

    def keep_first(record: BadRecord) -> None:
        bad.extend([] if bad else [record])

    for batch in read_batches(file, [field], on_bad=keep_first):
        if not isinstance(batch, TextBatch):
            raise ValueError(f"{file.path}: holds token ids; --contains searches text")
        count += len(batch.texts[0])
        yield batch.texts[0]
    if bad and not count:
        raise ValueError(f"{file.path}:{bad[0].line}: {bad[0].reason}")


def _raw_files(provenance: Provenance | ShardedProvenance, root: Path | None) -> list[RawFile]:
    """Return the raw files that a corpus' documents came from, in their order."""
    names: dict[str, None] = {}
    for begin in range(0, provenance.num_documents, GROUP_DOCUMENTS):
        end = min(begin + GROUP_DOCUMENTS, provenance.num_documents)
        shards = provenance.documents(np.arange(begin, end), ["shard"])["shard"]
        names.update(dict.fromkeys(shards.unique().to_pylist()))
    files = []
    for name in names:
        path = find_raw_file(name, root)
        if path is None:
            raise FileNotFoundError(
                f"{name}: no such file here, and --contains reads the raw text; give the folder "
                f"that the raw files are in now with --raw-folder"
            )
        files.append(RawFile(str(path), path.stat().st_size))
    return files


def _field_of(prefixes: Sequence[str]) -> str:
    """Return the field of the raw records that a corpus was made from."""
    first = Path(prefixes[0])
    summary = read_shard_summary(str(first))
    named = text_field(str(first if len(prefixes) == 1 else first.parent))
    return str(summary.settings.get("json_key", named)) if summary is not None else named
