"""The ledger's bytes: records of 128, chained by SHA-256, and the JSON lines bound to them.

docs/ledger.md specifies the format; a ledger is verified with that page and SHA-256 alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

VERSION = 1

#: The chain before record 0.
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
BODY_BYTES = 96

RECORDS_FILE = "records.led"
EVENTS_FILE = "events.jsonl"
FORKS_FOLDER = "forks"
LOCK_FILE = "lock"


class Kind(IntEnum):
    """What a record is; 0 is no kind, so that a page of zeros is never a record."""

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
    """The last record of a ledger, or of its part that a checkpoint refers to."""

    seq: int
    chain: str


#: The head of a ledger without records.
EMPTY = Head(-1, GENESIS.hex())


class LedgerError(ValueError):
    """A ledger that is damaged, behind its checkpoint or in use, or an append that breaks it."""


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
