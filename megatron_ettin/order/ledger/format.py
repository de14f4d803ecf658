"""Format of the ledger: records of 128 bytes, chained by SHA-256, and JSON lines bound to them.

docs/ledger.md specifies the format. That page and SHA-256 are enough to verify a ledger.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

VERSION = 1

#: The chain before record 0. Its text keeps a ledger apart from any other chain of SHA-256.
GENESIS = hashlib.sha256(b"megatron-ettin-ledger/1\0").digest()

#: One record. `chain` is SHA-256 of the previous record's chain and this record's bytes 0..96.
#: In a record that is not a STEP, bytes 48..80 are the SHA-256 of its line in events.jsonl and
#: bytes 80..88 repeat the first 8 of them.
RECORD = np.dtype(
    [
        ("kind", "u1"),
        ("version", "u1"),
        ("flags", "<u2"),
        ("phase", "<u4"),
        ("seq", "<u8"),
        ("step", "<u8"),
        ("g_begin", "<u8"),
        ("g_end", "<u8"),
        ("n_tokens", "<u8"),
        ("order_digest", "<u8", (2,)),
        ("token_digest", "<u8", (2,)),
        ("mask_digest", "<u8"),
        ("unix_ns", "<u8"),
        ("chain", "u1", (32,)),
    ]
)
RECORD_BYTES = RECORD.itemsize
#: Bytes of a record before its chain. The chain of one record and the body of the next are
#: neighbours in the file, so each chain is the hash of 128 bytes in one piece.
BODY_BYTES = 96

RECORDS_FILE = "records.led"
EVENTS_FILE = "events.jsonl"
FORKS_FOLDER = "forks"
LOCK_FILE = "lock"


class Kind(IntEnum):
    """Kind of a record; 0 is none, so a page of zeros that a crash left is never a record."""

    START = 1
    STEP = 2
    SKIP = 3
    CHECKPOINT = 4
    FORK = 5
    PHASE = 6
    RESUME = 7
    END = 8
    AMEND = 9


class Head(NamedTuple):
    """Number and chain of a record; a checkpoint holds the one that was last when it was saved."""

    seq: int
    chain: str


#: The head of a ledger without records.
EMPTY = Head(-1, GENESIS.hex())


class LedgerError(ValueError):
    """The ledger is damaged, in use or behind its checkpoint, or an append would break it."""


def seal(content: bytearray, chain: bytes) -> bytes:
    """Write the chain into `content`, whole records that follow `chain`; return the last chain."""
    sha256 = hashlib.sha256
    for begin in range(0, len(content), RECORD_BYTES):
        end = begin + BODY_BYTES
        chain = sha256(chain + content[begin:end]).digest()
        content[end : end + 32] = chain
    return chain


def format_event(seq: int, kind: Kind, payload: Mapping[str, Any]) -> bytes:
    """Return the line of one event without its newline: JSON in UTF-8, keys in the given order.

    Raises:
        LedgerError: when JSON cannot hold the payload (NaN, an object of another type).
    """
    entry = {"seq": seq, "kind": kind.name, "payload": dict(payload)}
    try:
        text = json.dumps(entry, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode()
    except (TypeError, ValueError) as error:
        raise LedgerError(f"the payload of a {kind.name} record is no JSON: {error}") from error
