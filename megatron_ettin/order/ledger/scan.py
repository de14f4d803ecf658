"""Checking a ledger up to its first fault: the chain, the counters, and the lines of events."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.order.ledger.format import (
    BODY_BYTES,
    EVENTS_FILE,
    GENESIS,
    RECORD,
    RECORD_BYTES,
    RECORDS_FILE,
    VERSION,
    Head,
    Kind,
)

#: Records whose digests are held in memory at a time.
_BLOCK = 65_536


@dataclass(frozen=True)
class LedgerFault:
    """The first record that is wrong: its seq, the file and byte where it shows, and what."""

    record: int
    file: str
    byte: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}: record {self.record}, byte {self.byte}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Valid records [n] of a ledger, from its first record on, and the torn bytes after them.

    `line_ends` [e] are the byte offsets in events.jsonl at which the lines of the e valid events
    end. `fault` is None if the torn bytes are just a record or line that was never finished.
    """

    records: NDArray[np.void]
    first_seq: int
    parent_chain: bytes
    payloads: dict[int, dict[str, Any]]
    line_ends: list[int]
    torn_bytes: int
    torn_event_bytes: int
    fault: LedgerFault | None

    def head(self, count: int | None = None) -> Head:
        """Return the head after the first `count` records, by default after all."""
        count = len(self.records) if count is None else count
        chain = self.records["chain"][count - 1].tobytes() if count else self.parent_chain
        return Head(self.first_seq + count - 1, chain.hex())

    def past_end(self, at: Head) -> Head:
        """Return the END record directly after `at`, or `at` if there is none.

        A run that continues keeps its END record: it undoes nothing, and its head may have been
        published.
        """
        end = at.seq + 1 - self.first_seq
        is_end = end < len(self.records) and self.records["kind"][end] == Kind.END
        return self.head(end + 1) if is_end else at

    def event_bytes(self, count: int) -> int:
        """Return where the lines of the first `count` records end in events.jsonl."""
        events = int(np.count_nonzero(self.records["kind"][:count] != Kind.STEP))
        return self.line_ends[events - 1] if events else 0


def scan(
    content: bytes,
    lines: bytes,
    *,
    first_seq: int = 0,
    parent_chain: bytes = GENESIS,
    verify: bool = True,
) -> Scan:
    """Read records and lines up to the first fault; a fork's follow record `first_seq - 1`.

    With `verify=False` nothing is hashed; lines are still matched with their records. A fault
    counts where it shows first: everything after it is torn.
    """
    whole = len(content) // RECORD_BYTES
    records = np.frombuffer(content, RECORD, count=whole)
    faults: list[tuple[int, str]] = []
    if verify:
        broken = _first_broken(content, records, parent_chain)
        if broken < whole:
            faults.append((broken, "its chain is not the SHA-256 of the chain before and its body"))
        faults.extend(_miscounted(records[: broken + 1], first_seq))
    index, what = min(faults, key=lambda fault: fault[0], default=(whole, ""))
    fault = (
        LedgerFault(first_seq + index, RECORDS_FILE, index * RECORD_BYTES, what) if what else None
    )
    payloads, line_ends, unbound = _bind(records[:index], lines, first_seq, verify)
    if unbound is not None:
        fault = unbound
        index = unbound.record - first_seq
    return Scan(
        records=records[:index],
        first_seq=first_seq,
        parent_chain=parent_chain,
        payloads=payloads,
        line_ends=line_ends,
        torn_bytes=len(content) - index * RECORD_BYTES,
        torn_event_bytes=len(lines) - (line_ends[-1] if line_ends else 0),
        fault=fault,
    )


def _first_broken(content: bytes, records: NDArray[np.void], parent_chain: bytes) -> int:
    """Return the first record whose chain is wrong, or the number of records.

    The chain before a record and its body are neighbours in the file, so they are hashed in place.
    """
    count = len(records)
    if count == 0:
        return 0
    sha256 = hashlib.sha256
    first = sha256(parent_chain + content[:BODY_BYTES]).digest()
    if first != content[BODY_BYTES:RECORD_BYTES]:
        return 0
    view = memoryview(content)
    for begin in range(1, count, _BLOCK):
        end = min(begin + _BLOCK, count)
        starts = range(begin * RECORD_BYTES - 32, end * RECORD_BYTES - 32, RECORD_BYTES)
        digests = b"".join([sha256(view[at : at + RECORD_BYTES]).digest() for at in starts])
        computed = np.frombuffer(digests, np.uint8).reshape(-1, 32)
        wrong = (computed != records["chain"][begin:end]).any(axis=1)
        if wrong.any():
            return begin + int(wrong.argmax())
    return count


def _miscounted(records: NDArray[np.void], first_seq: int) -> list[tuple[int, str]]:
    """Return, for each rule that is broken, the first record that breaks it and a message."""
    if len(records) == 0:
        return []
    kind, step = records["kind"], records["step"]
    begin, end = records["g_begin"], records["g_end"]
    seq = np.arange(first_seq, first_seq + len(records), dtype=np.uint64)
    # Each rule compares whole columns, not record by record: ledgers have a record a step.
    moves = (kind == Kind.STEP) | (kind == Kind.SKIP)
    step_due, begin_due = step.copy(), begin.copy()  # the first record has nothing before it
    step_due[1:] = step[:-1] + (kind[1:] == Kind.STEP)
    begin_due[1:] = end[:-1]
    known = np.isin(kind, [int(known) for known in Kind])
    rules = [
        (~known, "its kind is {kind}, which this version does not know"),
        (records["version"] != VERSION, "its version is {version}, this program reads 1"),
        (records["flags"] != 0, "its flags are {flags}, version 1 has none"),
        (records["seq"] != seq, "its seq is {seq}"),
        ((kind == Kind.START) != (seq == 0), "its kind is {kind}: record 0, only, is START (1)"),
        (step != step_due, "its step is {step}, but a STEP counts on by one, others repeat"),
        (begin != begin_due, "its g_begin is {g_begin}, not the g_end of the record before"),
        ((end > begin) != moves, "its rows are [{g_begin}, {g_end}): a STEP or SKIP has some"),
        (end < begin, "its rows are [{g_begin}, {g_end})"),
    ]
    faults = []
    for wrong, text in rules:
        if wrong.any():
            index = int(wrong.argmax())
            record = records[index]
            values = {name: int(record[name]) for name in ("kind", "version", "flags", "seq")}
            values |= {name: int(record[name]) for name in ("step", "g_begin", "g_end")}
            faults.append((index, text.format(**values)))
    return faults


def _bind(
    records: NDArray[np.void], lines: bytes, first_seq: int, verify: bool
) -> tuple[dict[int, dict[str, Any]], list[int], LedgerFault | None]:
    """Return the payloads by seq, the ends of their lines, and the first event without a line."""
    payloads: dict[int, dict[str, Any]] = {}
    ends: list[int] = []
    begin = 0
    for index in np.flatnonzero(records["kind"] != Kind.STEP).tolist():
        seq = first_seq + index
        end = lines.find(b"\n", begin)
        if end < 0:
            what = "its line is missing or not finished"
            return payloads, ends, LedgerFault(seq, EVENTS_FILE, begin, what)
        what, payload = _payload(records[index], seq, lines[begin:end], verify)
        if what:
            return payloads, ends, LedgerFault(seq, EVENTS_FILE, begin, what)
        payloads[seq] = payload
        ends.append(end + 1)
        begin = end + 1
    return payloads, ends, None


def _payload(record: np.void, seq: int, line: bytes, verify: bool) -> tuple[str, dict[str, Any]]:
    """Return a message if an event's line is wrong, else "", and its payload."""
    if verify:
        digest = hashlib.sha256(line).digest()
        # Bytes 48..88 are the digest fields of a STEP; in an event they bind its line.
        if record.tobytes()[48:88] != digest + digest[:8]:
            return "its line is not the one whose SHA-256 the record holds", {}
    try:
        entry = json.loads(line)
    except ValueError as error:
        return f"its line is no JSON ({error})", {}
    if (
        not isinstance(entry, dict)
        or entry.get("seq") != seq
        or entry.get("kind") != Kind(int(record["kind"])).name
        or not isinstance(entry.get("payload"), dict)
    ):
        return "its line is another record's", {}
    return "", entry["payload"]
