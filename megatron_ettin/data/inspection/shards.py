"""Shards of a corpus and their summaries.

A corpus is one shard, PREFIX.bin with its companions, or a folder PREFIX of several.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.order.shard_list import DATASET_FILE

#: Last part of the prefixes of a field's two corpora; the training corpus has the summary of both.
TRAINING, VALIDATION = "_document", "_validation"
NO_TOKEN = "no token"


@dataclass(frozen=True, kw_only=True)
class InputRecord:
    """Raw file that a shard was made from, as its summary names it."""

    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """Summary of a shard, read from its .json; None where the file does not say."""

    path: Path
    documents: int | None
    tokens: int | None
    made_tokens: int | None
    """Tokens of all documents that the inputs gave, for training and for validation."""
    tokenizer_sha256: str | None
    inputs: tuple[InputRecord, ...]
    sizes: dict[str, int]
    """Bytes of files in the summary's folder, by name."""
    dropped: dict[str, int]
    """Documents that were not stored, by reason; for both corpora together."""
    settings: dict[str, Any]
    """Options that the shard was made with, by name."""


def corpus_shards(prefix: str) -> list[str]:
    """Return the prefixes of a corpus' shards, in their order.

    Raises:
        FileNotFoundError: there is neither PREFIX.idx nor a folder PREFIX with an .idx.
    """
    if Path(f"{prefix}.idx").is_file():
        return [prefix]
    folder = Path(prefix)
    shards = [str(path.with_suffix("")) for path in sorted(folder.glob("*.idx"))]
    if not shards:
        raise FileNotFoundError(
            f"{prefix}: no corpus (neither {prefix}.idx nor an .idx in a folder {prefix}); name it "
            f"without a suffix, as in corpora/small_text_document"
        )
    return shards


def is_validation(prefix: str) -> bool:
    """Tell whether a corpus holds the validation documents, as its name says."""
    return prefix.endswith(VALIDATION)


def read_dataset(prefix: str) -> dict[str, Any] | None:
    """Return the content of PREFIX/dataset.json; None if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(prefix) / DATASET_FILE
    return read_json(path) if path.is_file() else None


def read_shard_summary(shard: str) -> ShardSummary | None:
    """Return a shard's summary; that of a validation corpus is beside its training corpus.

    None if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    for path, is_other in ((Path(f"{shard}.json"), False), (_training_summary(shard), True)):
        if path is not None and path.is_file():
            return _summary(path, read_json(path), "validation_" if is_other else "")
    return None


def text_field(prefix: str) -> str:
    """Return the field of the raw records that a corpus holds, as its name says."""
    name = Path(prefix).name
    for end in (TRAINING, VALIDATION):
        name = name.removesuffix(end)
    return name.rpartition("_")[2] or "text"


def _training_summary(shard: str) -> Path | None:
    """Return where the summary of a validation shard is: beside the training shard it belongs to.

    The folder or the file has the name that ends in `_validation`.
    """
    path = Path(shard)
    if path.name.endswith(VALIDATION):
        return path.with_name(path.name.removesuffix(VALIDATION) + TRAINING + ".json")
    if path.parent.name.endswith(VALIDATION):
        folder = path.parent.with_name(path.parent.name.removesuffix(VALIDATION) + TRAINING)
        return folder / f"{path.name}.json"
    return None


def _summary(path: Path, content: Mapping[str, Any], part: str) -> ShardSummary:
    try:
        inputs = content["inputs"] if "inputs" in content else [content["input"]]
        dropped = content.get("dropped", {})
        tokens, validation_tokens = content.get("tokens"), content.get("validation_tokens", 0)
        return ShardSummary(
            path=path,
            documents=content.get(f"{part}documents"),
            tokens=content.get(f"{part}tokens"),
            made_tokens=None if tokens is None else tokens + validation_tokens,
            tokenizer_sha256=content.get("tokenizer_digest"),
            inputs=tuple(InputRecord(path=i["path"], sha256=i["sha256"]) for i in inputs),
            sizes=dict(content.get("sizes", {})),
            dropped=dict(dropped) if isinstance(dropped, dict) else {NO_TOKEN: dropped},
            settings=dict(content.get("settings", {})),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged, or not a summary of a corpus ({error!r})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; ValueError naming the file if it holds none."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged (not a JSON object)")
    return content
