"""Reading a run's ledger, with proof that no record was changed, moved or removed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.order.ledger.format import (
    EVENTS_FILE,
    FORKS_FOLDER,
    RECORDS_FILE,
    Head,
    Kind,
    LedgerError,
)
from megatron_ettin.order.ledger.scan import Scan, scan


class Checkpoint(NamedTuple):
    """A CHECKPOINT record: its head, the step and row g at which it was saved, its payload."""

    head: Head
    step: int
    g: int
    payload: dict[str, Any]


class Fork(NamedTuple):
    """A FORK record: what was cut after record `parent_seq` when the run went back to it.

    `file` is the name in forks/ without `.led` and `.jsonl`. `records` and `steps` count the valid
    records that were cut; the torn bytes came after them.
    """

    seq: int
    file: str
    parent_seq: int
    parent_chain: str
    records: int
    steps: int
    torn_bytes: int
    torn_event_bytes: int
    sha256: str


def find_description(events: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Return the payload of the last START or RESUME in `events` (by seq); {} if there is none."""
    told = [payload for payload in events.values() if "objective" in payload]
    return told[-1] if told else {}


class Ledger:
    """A ledger as it was when it was read.

    `records` [n] is a structured array of dtype RECORD; `events` holds, by seq, the payloads of the
    records that are not STEP; `head` is the last record. `torn_bytes` and `torn_event_bytes` count
    the bytes after the last whole record and line: a writer is at work, or was killed.
    """

    def __init__(self, folder: Path, content: Scan) -> None:
        """Take the content of the ledger in `folder`."""
        self.folder = folder
        self.records = content.records
        self.events = content.payloads
        self.head = content.head()
        self.torn_bytes = content.torn_bytes
        self.torn_event_bytes = content.torn_event_bytes
        self.steps: NDArray[np.void] = self.records[self.records["kind"] == Kind.STEP]
        self._sums: dict[str, NDArray[np.uint64]] = {}

    @classmethod
    def read(cls, folder: Path, verify: bool = True) -> Self:
        """Read RUN/ledger, also while a writer appends to it.

        Raises:
            FileNotFoundError: there is no ledger in `folder`.
            LedgerError: naming file, record and byte of the first fault.
        """
        # Records first: the line of a record is written before it, so it is on disk by now.
        content = (folder / RECORDS_FILE).read_bytes()
        scanned = scan(content, (folder / EVENTS_FILE).read_bytes(), verify=verify)
        if scanned.fault is not None:
            raise LedgerError(f"{folder}/{scanned.fault}")
        return cls(folder, scanned)

    @classmethod
    def empty(cls, folder: Path) -> Self:
        """Return a ledger without records: of a run that took no step, or that Megatron trained."""
        return cls(folder, scan(b"", b""))

    def read_fork(self, fork: Fork) -> Self:
        """Read and verify the records that were cut to `fork`, as a Ledger of their own.

        Raises:
            LedgerError: naming file, record and byte of the first fault.
        """
        path = self.folder / FORKS_FOLDER / fork.file
        content, lines = (path.with_suffix(end).read_bytes() for end in (".led", ".jsonl"))
        scanned = scan(
            content,
            lines,
            first_seq=fork.parent_seq + 1,
            parent_chain=bytes.fromhex(fork.parent_chain),
        )
        if len(scanned.records) < fork.records:
            fault = scanned.fault or f"it ends after {len(scanned.records)} records"
            raise LedgerError(f"{path}: {fault}; FORK record {fork.seq} says {fork.records}")
        if hashlib.sha256(content + lines).hexdigest() != fork.sha256:
            last = fork.parent_seq + fork.records
            raise LedgerError(
                f"{path}: the torn bytes after record {last} are not those whose "
                f"SHA-256 FORK record {fork.seq} holds"
            )
        return type(self)(self.folder, scanned)

    @cached_property
    def step_ends(self) -> NDArray[np.uint64]:
        """`g_end` of the STEP records [n], in one piece, to be searched."""
        return np.ascontiguousarray(self.steps["g_end"])

    def cumulative(self, field: str) -> NDArray[np.uint64]:
        """Return the sums of a field over the STEP records up to each, modulo 2^64 per lane.

        [n] for `n_tokens` and `mask_digest`, [n, 2] for `order_digest` and `token_digest`.
        """
        if field not in self._sums:
            sums = np.cumsum(self.steps[field], axis=0, dtype=np.uint64)
            sums.flags.writeable = False  # given out again
            self._sums[field] = sums
        return self._sums[field]

    def holds(self, head: Head) -> bool:
        """Tell whether `head` is one of these records, with the same chain."""
        # A fork's records may begin above seq 0. Equal chains mean equal records up to there.
        index = head.seq - (int(self.records["seq"][0]) if len(self.records) else 0)
        return (
            0 <= index < len(self.records)
            and self.records["chain"][index].tobytes().hex() == head.chain
        )

    def checkpoints(self) -> list[Checkpoint]:
        """Return the CHECKPOINT records in their order."""
        return [
            Checkpoint(
                Head(int(record["seq"]), record["chain"].tobytes().hex()),
                int(record["step"]),
                int(record["g_end"]),
                self.events[int(record["seq"])],
            )
            for record in self.records[self.records["kind"] == Kind.CHECKPOINT]
        ]

    def forks(self) -> list[Fork]:
        """Return the FORK records in their order; a fork's own are in `read_fork(fork).forks()`."""
        fields = [name for name in Fork._fields if name != "seq"]
        return [
            Fork(seq, *(self.events[seq][name] for name in fields))
            for seq in self.records["seq"][self.records["kind"] == Kind.FORK].tolist()
        ]
