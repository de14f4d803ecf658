"""Corpora cut into shards, for tests."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

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


def list_in_dataset_file(folder: Path, names: Sequence[str]) -> None:
    """Write the file that names the shards of a folder, as preprocessing does."""
    shards = [{"name": name, "documents": 1} for name in names]
    (folder / "dataset.json").write_text(json.dumps({"format": "any", "shards": shards}))
