"""Corpora cut into shards, for tests."""

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from megatron_ettin.data.batches import TextBatch
from megatron_ettin.data.encoding import EncodedPart
from megatron_ettin.data.provenance import CorpusWriter
from megatron_ettin.native import TokenFile, TokenFileBuilder


def cut_into_shards(prefix: Path, folder: Path, cuts: Sequence[int]) -> list[str]:
    """Write the documents of a pair, cut at these documents, as shards of a folder; return them."""
    file = TokenFile(prefix)
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, (begin, end) in enumerate(pairwise([0, *cuts, file.num_documents])):
        shards.append(str(folder / f"{number:05d}"))
        builder = TokenFileBuilder(shards[-1], file.dtype)
        for document in range(begin, end):
            builder.add(file.tokens(document))
        builder.commit()
    return shards


def describe_shards(shards: Sequence[str], tokenizer_sha256: str) -> None:
    """Write shards anew with sidecars; document n of them all has the text and the id "doc n".

    Document 13 is a copy of document 3, of the same text and id.
    """
    first = 0
    for shard in shards:
        file = TokenFile(shard)
        numbers = range(first, first + file.num_documents)
        tokens = [file.tokens(n) for n in range(file.num_documents)]
        texts = [f"doc {3 if n == 13 else n}" for n in numbers]
        with CorpusWriter(Path(shard), file.dtype, tokenizer_sha256=tokenizer_sha256) as writer:
            for n, text, ids in zip(numbers, texts, tokens, strict=True):
                part = EncodedPart(
                    tokens=ids.astype(np.int32),
                    lengths=np.array([len(ids)], dtype=np.int64),
                    places=np.arange(1),
                    sha256=hashlib.sha256(text.encode()).digest(),
                )
                batch = TextBatch(([text],), [text], [f"https://{n}.example"], [n + 1], n)
                writer.add(part, batch, f"raw{n % 3}.txt")
        first += file.num_documents


def list_in_dataset_file(folder: Path, names: Sequence[str]) -> None:
    """Write the file that names the shards of a folder, as preprocessing does."""
    shards = [{"name": name, "documents": 1} for name in names]
    (folder / "dataset.json").write_text(json.dumps({"format": "any", "shards": shards}))
