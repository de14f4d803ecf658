"""The files of a run and its corpora, by docs/ledger.md and docs/data.md alone."""

from __future__ import annotations

import hashlib
import json
import struct
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class MismatchError(Exception):
    """The run is not what its record says."""


def require(is_so: bool, what: str) -> None:
    if not is_so:
        raise MismatchError(what)


# data.md: a corpus and a tokenizer


class Corpus:
    """A pair or several, its shards, whose documents are numbered through."""

    def __init__(self, prefix: str | list[str]) -> None:
        names = [prefix] if isinstance(prefix, str) else prefix
        self.pairs = [Pair(shard) for name in names for shard in shards(name)]
        self.lengths = [length for pair in self.pairs for length in pair.lengths]
        self.ends = list(accumulate(len(pair.lengths) for pair in self.pairs))

    def hashes(self, name: str, documents: int) -> list[str]:
        """Return hashes of the first shards of so many documents; several if some are empty."""
        return [
            combined([getattr(pair, name) for pair in self.pairs[: count + 1]])
            for count, end in enumerate(self.ends)
            if end == documents
        ]

    def tokens(self, document: int, offset: int, count: int) -> list[int]:
        shard = bisect_right(self.ends, document)
        pair = self.pairs[shard]
        return pair.tokens(document - self.ends[shard] + len(pair.lengths), offset, count)


def shards(prefix: str) -> list[str]:
    folder = Path(prefix.rstrip("/"))
    if Path(f"{folder}.idx").exists() or not folder.is_dir():
        return [prefix]
    return sorted(str(path.with_suffix("")) for path in folder.glob("*.idx"))


def combined(hashes: list[str]) -> str:
    if len(hashes) == 1:
        return hashes[0]
    return sha256(json.dumps(hashes, separators=(",", ":")).encode())


class Pair:
    """A .bin and its .idx."""

    def __init__(self, prefix: str) -> None:
        index = Path(prefix + ".idx").read_bytes()
        magic, version, code, sequences, borders = struct.unpack_from("<9sQBQQ", index)
        require(magic == b"MMIDIDX\0\0" and version == 1, f"{prefix}.idx: not an index")
        sizes = np.frombuffer(index, "<i4", sequences, 34).astype(np.int64)
        first = np.frombuffer(index, "<i8", borders, 34 + 12 * sequences)
        begins = np.concatenate([[0], np.cumsum(sizes)])[first]
        self.begins: list[int] = begins.tolist()
        self.lengths: list[int] = np.diff(begins).tolist()
        self.ids = np.fromfile(prefix + ".bin", {8: "<u2", 4: "<i4"}[code])
        self.lengths_sha256 = sha256(np.diff(begins).astype("<i8").tobytes())
        self.tokens_sha256 = sha256(self.ids.tobytes())

    def tokens(self, document: int, offset: int, count: int) -> list[int]:
        begin = self.begins[document] + offset
        return self.ids[begin : begin + count].tolist()


def token_ids(content: bytes) -> dict[str, int]:
    """Return the special ids and the length of a tokenizer.json (order.md 7)."""
    tokenizer = json.loads(content)
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {entry[0]: i for i, entry in enumerate(vocabulary)}
    vocabulary = vocabulary | {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    special = {
        name: vocabulary[f"[{name.upper()}]"] for name in ("unk", "cls", "sep", "pad", "mask")
    }
    return {"vocab_size": max(vocabulary.values()) + 1, **special}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ledger.md: the records


class Record(NamedTuple):
    kind: str
    phase: int
    seq: int
    step: int
    g_begin: int
    g_end: int
    n_tokens: int
    lanes: list[int]
    chain: str
    payload: dict[str, Any]


KINDS = ["", "START", "STEP", "SKIP", "CHECKPOINT", "FORK", "PHASE", "RESUME", "END", "AMEND"]


def read_ledger(folder: Path) -> Iterator[Record]:
    content = (folder / "records.led").read_bytes()
    lines = iter((folder / "events.jsonl").read_bytes().splitlines())
    chain = hashlib.sha256(b"megatron-ettin-ledger/1\0").digest()
    before: Record | None = None
    for at in range(0, len(content) // 128 * 128, 128):
        record = content[at : at + 128]
        chain = hashlib.sha256(chain + record[:96]).digest()
        require(chain == record[96:], f"record {at // 128}: wrong chain")
        kind, _, _, phase, *numbers = struct.unpack_from("<BBHI12Q", record)
        payload = {}
        if kind != KINDS.index("STEP"):
            line = next(lines, b"")
            digest = hashlib.sha256(line).digest()
            require(digest == record[48:80], f"record {at // 128}: wrong line in events.jsonl")
            payload = json.loads(line)["payload"]
        found = Record(KINDS[kind], phase, *numbers[:5], numbers[5:10], chain.hex(), payload)
        require(found.seq == at // 128 and follows(before, found), f"record {at // 128}: a gap")
        yield found
        before = found


def follows(before: Record | None, record: Record) -> bool:
    """Tell whether a record counts on from the one before it (ledger.md 2)."""
    if before is None or record.kind == "START":
        return before is None and record.kind == "START"
    step = before.step + (record.kind == "STEP")
    has_rows = record.kind in ("STEP", "SKIP")
    return (
        record.step == step
        and record.g_begin == before.g_end
        and record.g_end >= record.g_begin
        and (record.g_end > record.g_begin) == has_rows
    )
