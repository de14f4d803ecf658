"""Moving the end of a ledger to forks/, in a way that survives a crash at any point.

`forks/pending.json` decides the move when it appears. A crash before that leaves the ledger as it
was; a crash after it is finished by the next open, never undone.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.order.ledger.format import (
    FORKS_FOLDER,
    RECORD_BYTES,
    Head,
    Kind,
    LedgerError,
)
from megatron_ettin.order.ledger.scan import Scan
from megatron_ettin.publication import (
    publish_bytes,
    publish_text,
    remove_leftovers,
    rename_durably,
    sync,
)

_PENDING = "pending.json"
_COPY = "unfinished"  # a copy of the records that move, until the move is decided
_SUFFIXES = (".led", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A decided move: payload and time of its FORK record, and the bytes that both files keep."""

    payload: dict[str, Any]
    record_bytes: int
    event_bytes: int
    unix_ns: int


def decide_cut(folder: Path, scanned: Scan, keep: int, content: bytes, lines: bytes) -> Cut:
    """Copy everything after the first `keep` records, torn bytes too, and publish the move."""
    parent = scanned.head(keep)
    record_bytes, event_bytes = keep * RECORD_BYTES, scanned.event_bytes(keep)
    parts = (content[record_bytes:], lines[event_bytes:])
    digest = hashlib.sha256(parts[0] + parts[1]).hexdigest()
    moved = scanned.records[keep:]
    cut = Cut(
        payload={
            "file": f"fork_{keep}_{digest[:12]}",
            "parent_seq": parent.seq,
            "parent_chain": parent.chain,
            "records": len(moved),
            "steps": int(np.count_nonzero(moved["kind"] == Kind.STEP)),
            "torn_bytes": scanned.torn_bytes,
            "torn_event_bytes": scanned.torn_event_bytes,
            "sha256": digest,
        },
        record_bytes=record_bytes,
        event_bytes=event_bytes,
        unix_ns=time.time_ns(),
    )
    forks = folder / FORKS_FOLDER
    for suffix, part in zip(_SUFFIXES, parts, strict=True):
        publish_bytes(forks / f"{_COPY}{suffix}", part)
    publish_text(forks / _PENDING, json.dumps(asdict(cut)))
    return cut


def read_pending_cut(folder: Path) -> Cut | None:
    """Return the move that a crash interrupted; if none was decided, remove unfinished files."""
    forks = folder / FORKS_FOLDER
    path = forks / _PENDING
    try:
        return Cut(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        remove_leftovers(forks / _PENDING)
        for suffix in _SUFFIXES:
            remove_leftovers(forks / f"{_COPY}{suffix}")
            (forks / f"{_COPY}{suffix}").unlink(missing_ok=True)
        return None
    except (TypeError, ValueError) as error:
        raise LedgerError(f"{path}: not what a ledger writes ({error}); restore it") from error


def publish_fork(folder: Path, cut: Cut) -> None:
    """Rename the copies to their final names, unless an interrupted call did so already."""
    forks = folder / FORKS_FOLDER
    for suffix in _SUFFIXES:
        copy, name = forks / f"{_COPY}{suffix}", forks / f"{cut.payload['file']}{suffix}"
        if copy.exists():
            rename_durably(copy, name)
        elif not name.exists():
            raise LedgerError(f"{name}: missing, but {_PENDING} says it was written; restore it")


def end_cut(folder: Path) -> None:
    """Forget the move: its FORK record is durable."""
    (folder / FORKS_FOLDER / _PENDING).unlink()
    sync(folder / FORKS_FOLDER)


def find_fork(folder: Path, head: Head) -> str | None:
    """Return the name of the fork in which `head` is a record."""
    for path in sorted((folder / FORKS_FOLDER).glob("fork_*.led")):
        # The name says the first record that was cut: fork_SEQ_DIGEST.
        index = head.seq - int(path.stem.split("_")[1])
        end = (index + 1) * RECORD_BYTES
        # The chain is the last 32 bytes of a record.
        if index >= 0 and path.read_bytes()[end - 32 : end].hex() == head.chain:
            return path.stem
    return None
