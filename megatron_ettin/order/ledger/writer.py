"""Appending to a run's ledger: one writer at a time, and no kill loses synced records."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_ettin.order.ledger.forks import (
    Cut,
    decide_cut,
    end_cut,
    find_fork,
    publish_fork,
    read_pending_cut,
)
from megatron_ettin.order.ledger.format import (
    EMPTY,
    EVENTS_FILE,
    FORKS_FOLDER,
    GENESIS,
    RECORD,
    RECORD_BYTES,
    RECORDS_FILE,
    VERSION,
    Head,
    Kind,
    LedgerError,
    format_event,
    seal,
)
from megatron_ettin.order.ledger.lock import lock_ledger
from megatron_ettin.order.ledger.scan import Scan, scan
from megatron_ettin.publication import sync

_logger = logging.getLogger(__name__)


class LedgerWriter:
    """The only writer of RUN/ledger; `open` makes it, `close` or a with block ends it."""

    def __init__(self, folder: Path) -> None:
        """Lock the folder and open its files. Call `open` instead, which also verifies them."""
        self.folder = folder
        self._paths = {name: folder / name for name in (RECORDS_FILE, EVENTS_FILE)}
        self._lock = self._records = self._events = -1
        self._seq, self._step, self._g, self._chain = 0, 0, 0, GENESIS
        self._record_bytes = self._event_bytes = 0
        self._is_torn = False
        self._owed: Cut | None = None
        #: Name of the fork that the record after the head given to `open` tells of, if it is one.
        self.fork: str | None = None
        #: Payloads, by seq, of the records that `open` kept.
        self.events: dict[int, dict[str, Any]] = {}
        try:
            (folder / FORKS_FOLDER).mkdir(parents=True, exist_ok=True)
            self._lock = lock_ledger(folder)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._records = os.open(folder / RECORDS_FILE, flags, 0o644)
            self._events = os.open(folder / EVENTS_FILE, flags, 0o644)
            sync(folder)
            sync(folder.parent)
        except BaseException:
            self.close()
            raise
        # A worker forked from this process must not keep the lock when this process is killed.
        writer = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close(writer()))

    @classmethod
    def open(
        cls, folder: Path, at: Head | None = None, *, holding: Mapping[str, Any] | None = None
    ) -> Self:
        """Verify the ledger and continue it after record `at`, the head that a checkpoint holds.

        None means from the beginning. Records after `at` move to forks/, and a FORK record says
        so. An END record directly after `at` stays (docs/ledger.md). `holding` are fields that the
        payload of `at` must have.

        Raises:
            LedgerError: another process writes this ledger; a record up to `at` is damaged; the
                ledger ends before `at`, holds another record in its place, or one with other
                fields. Nothing was changed then.
        """
        writer = cls(folder)
        try:
            interrupted = read_pending_cut(folder)
            if interrupted is not None:
                _logger.warning("%s: finishing a fork that was interrupted", folder)
                writer._carry_out(interrupted)
            writer._continue_after(EMPTY if at is None else at, holding or {})
        except BaseException:
            writer.close()
            raise
        return writer

    @property
    def head(self) -> Head:
        """The last record; durable only once `sync` has returned it."""
        return Head(self._seq - 1, self._chain.hex())

    def append_steps(
        self,
        step: ArrayLike,
        phase: ArrayLike,
        g_begin: ArrayLike,
        g_end: ArrayLike,
        n_tokens: ArrayLike,
        order_digest: ArrayLike,
        token_digest: ArrayLike,
        mask_digest: ArrayLike,
    ) -> None:
        """Append one STEP record for each of n steps; all [n] integers, two digests [n, 2].

        Signed digests are taken modulo 2^64. Nothing is durable before `sync`.

        Raises:
            LedgerError: a step does not follow the one before by one, or its rows do not begin
                where the record before ended. Nothing is written then.
            OSError: the disk is full or fails. The ledger is as it was before.
        """
        count = len(np.asarray(step))
        records = np.zeros(count, RECORD)
        records["kind"] = Kind.STEP
        columns = (
            *(("step", step), ("phase", phase), ("g_begin", g_begin), ("g_end", g_end)),
            *(("n_tokens", n_tokens), ("mask_digest", mask_digest)),
        )
        for name, column in columns:
            records[name] = _whole(name, column, (count,))
        for name, column in (("order_digest", order_digest), ("token_digest", token_digest)):
            records[name] = _whole(name, column, (count, 2))
        if len(records):
            self._append(records, b"")

    def append(
        self,
        kind: Kind,
        *,
        step: int,
        g_begin: int,
        g_end: int,
        phase: int = 0,
        n_tokens: int = 0,
        payload: Mapping[str, Any],
    ) -> None:
        """Append a record that is not a STEP, and its payload as a line of events.jsonl.

        START is the first record and sets the step and row at which the run begins. SKIP moves on
        over rows [g_begin, g_end); the others have none and repeat the last step.

        Raises:
            LedgerError: the record does not follow the one before, or JSON cannot hold the payload.
                Nothing is written then.
            OSError: the disk is full or fails. The ledger is as it was before.
        """
        if kind in (Kind.STEP, Kind.FORK):
            raise LedgerError(f"{kind.name} records are not appended as events")
        if kind == Kind.START and self._seq == 0:
            self._step, self._g = step, g_begin
        record = np.zeros(1, RECORD)
        record["kind"] = kind
        record["step"], record["phase"], record["n_tokens"] = step, phase, n_tokens
        record["g_begin"], record["g_end"] = g_begin, g_end
        self._append_event(record, payload)
        if self._owed is not None:
            self._append_fork(self._owed)

    def sync(self) -> Head:
        """Make all that was appended durable and return the head for a checkpoint to hold."""
        # Lines first, so that this call never makes a record durable before its line.
        os.fdatasync(self._events)
        os.fdatasync(self._records)
        return self.head

    def close(self) -> None:
        """Release the lock. Not a sync: what was appended after the last one may be lost."""
        _close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append_event(
        self, record: NDArray[np.void], payload: Mapping[str, Any], unix_ns: int | None = None
    ) -> None:
        kind = Kind(int(record["kind"][0]))
        line = format_event(self._seq, kind, payload)
        digest = np.frombuffer(hashlib.sha256(line).digest(), "<u8")
        record["order_digest"], record["token_digest"] = digest[:2], digest[2:]
        record["mask_digest"] = digest[0]
        self._append(record, line + b"\n", unix_ns)

    def _append(self, records: NDArray[np.void], line: bytes, unix_ns: int | None = None) -> None:
        """Chain and write records [n], after `line`: no record is ever written without its line."""
        self._refuse_gaps(records)
        records["version"] = VERSION
        records["seq"] = np.arange(self._seq, self._seq + len(records), dtype=np.uint64)
        records["unix_ns"] = time.time_ns() if unix_ns is None else unix_ns
        content = bytearray(records.tobytes())
        chain = seal(content, self._chain)
        if self._is_torn:
            self._cut_torn_end()
        try:
            if line:
                _write_all(self._events, line, self._paths[EVENTS_FILE])
            _write_all(self._records, content, self._paths[RECORDS_FILE])
        except BaseException:
            # Both files go back to the last whole append, so the ledger stays readable. A disk that
            # is read-only refuses this too; then it is done before the next append.
            self._is_torn = True
            with suppress(OSError):
                self._cut_torn_end()
            raise
        self._follow(records[-1], chain, self._event_bytes + len(line))

    def _cut_torn_end(self) -> None:
        os.ftruncate(self._records, self._record_bytes)
        os.ftruncate(self._events, self._event_bytes)
        self._is_torn = False

    def _follow(self, last: np.void, chain: bytes, event_bytes: int) -> None:
        """Take `last` as the record that the next append follows."""
        self._chain = chain
        self._seq, self._step, self._g = int(last["seq"]) + 1, int(last["step"]), int(last["g_end"])
        self._record_bytes, self._event_bytes = self._seq * RECORD_BYTES, event_bytes

    def _refuse_gaps(self, records: NDArray[np.void]) -> None:
        """Raise LedgerError unless records [n], all of one kind, follow the last one."""
        if self._lock < 0:
            raise LedgerError(f"{self.folder}: this writer is closed")
        kind, step = int(records["kind"][0]), records["step"]
        begin, end = records["g_begin"], records["g_end"]
        if (kind == Kind.START) != (self._seq == 0):
            raise LedgerError(f"record {self._seq} is {Kind(kind).name}: record 0, only, is START")
        several = len(records) > 1  # spares one step the arithmetic of many
        if int(step[0]) != self._step + (kind == Kind.STEP) or (
            several and (np.diff(step) != 1).any()
        ):
            raise LedgerError(
                f"{Kind(kind).name} records of steps {step.tolist()} do not follow step "
                f"{self._step}: a STEP counts on by one, other records repeat the last step"
            )
        if int(begin[0]) != self._g or (several and (begin[1:] != end[:-1]).any()):
            raise LedgerError(
                f"{Kind(kind).name} at step {step[0]}: its rows begin at {begin.tolist()}, but "
                f"the record before ended at row {self._g}, and these at {end.tolist()}"
            )
        if not (end > begin).all() if kind in (Kind.STEP, Kind.SKIP) else end[0] != begin[0]:
            raise LedgerError(
                f"{Kind(kind).name} at step {step[0]}: its rows are [{begin[0]}, {end[0]}); "
                f"a STEP or SKIP has one or more, other records none"
            )

    def _continue_after(self, at: Head, holding: Mapping[str, Any]) -> None:
        """Verify the ledger, move the records after `at` to forks/ and continue after `at`."""
        content = self._paths[RECORDS_FILE].read_bytes()
        lines = self._paths[EVENTS_FILE].read_bytes()
        scanned = scan(content, lines)
        self._refuse_head(scanned, at)
        self._refuse_other_payload(scanned, at, holding)
        at = scanned.past_end(at)
        keep = at.seq + 1
        self.events = {seq: scanned.payloads[seq] for seq in scanned.payloads if seq < keep}
        if not self._follows_as_fork(scanned, at) and (
            len(content) > keep * RECORD_BYTES or len(lines) > scanned.event_bytes(keep)
        ):
            torn = scanned.torn_bytes + scanned.torn_event_bytes
            _logger.warning(
                "%s: moving %d records and %d torn bytes after record %d to %s/%s",
                *(self.folder, len(scanned.records) - keep, torn, at.seq, FORKS_FOLDER),
                f" ({scanned.fault})" if scanned.fault else "",
            )
            self._carry_out(decide_cut(self.folder, scanned, keep, content, lines))
        elif len(scanned.records):
            chain = bytes.fromhex(scanned.head().chain)
            self._follow(scanned.records[-1], chain, scanned.event_bytes(len(scanned.records)))
            self.fork = scanned.payloads.get(at.seq + 1, {}).get("file")

    def _refuse_head(self, scanned: Scan, at: Head) -> None:
        """Raise LedgerError unless the valid records include `at`."""
        have = len(scanned.records)
        if at.seq >= have and scanned.fault is not None:
            raise LedgerError(
                f"{self.folder}/{scanned.fault}. The checkpoint refers to record {at.seq}, so this "
                f"is damage, no torn end: restore the ledger's files, or resume from a checkpoint "
                f"whose record is before {have}"
            )
        if at.seq >= have:
            raise LedgerError(
                f"{self._paths[RECORDS_FILE]}: the ledger is behind the checkpoint: it ends "
                f"before record {have}, the checkpoint refers to record {at.seq}. Restore the "
                f"ledger's files, or resume from a checkpoint whose record is before {have}"
            )
        chain = scanned.head(at.seq + 1).chain
        if chain == at.chain:
            return
        fork = find_fork(self.folder, at)
        place = f"it was cut to {FORKS_FOLDER}/{fork}" if fork else "it is of another run"
        raise LedgerError(
            f"{self._paths[RECORDS_FILE]}: record {at.seq} has chain {chain}, the checkpoint's "
            f"has {at.chain}: {place}. Resume from a checkpoint of this ledger"
        )

    def _refuse_other_payload(self, scanned: Scan, at: Head, holding: Mapping[str, Any]) -> None:
        """Raise LedgerError unless the payload of record `at` has the fields `holding`."""
        recorded = scanned.payloads.get(at.seq, {})
        for name, value in holding.items():
            if recorded.get(name) != value:
                raise LedgerError(
                    f"{self._paths[RECORDS_FILE]}: record {at.seq} says {name} "
                    f"{recorded.get(name)}, but the checkpoint says {value}: restore the "
                    f"checkpoint as it was saved, or resume from another one"
                )

    def _follows_as_fork(self, scanned: Scan, at: Head) -> bool:
        """Tell whether all that follows `at` is the FORK record of an earlier return to it."""
        payload = scanned.payloads.get(at.seq + 1, {})
        return (
            len(scanned.records) == at.seq + 2
            and scanned.torn_bytes == scanned.torn_event_bytes == 0
            and scanned.records["kind"][-1] == Kind.FORK
            and payload.get("parent_chain") == at.chain
        )

    def _carry_out(self, cut: Cut) -> None:
        """Do or finish a decided fork; nothing else was written since the decision."""
        publish_fork(self.folder, cut)
        os.ftruncate(self._records, cut.record_bytes)
        os.ftruncate(self._events, cut.event_bytes)
        self.sync()
        self.fork = cut.payload["file"]
        if cut.record_bytes == 0:
            self._owed = cut  # its FORK record follows START, which only the caller can write
            return
        content = os.pread(self._records, RECORD_BYTES, cut.record_bytes - RECORD_BYTES)
        last = np.frombuffer(content, RECORD)[0]
        self._follow(last, last["chain"].tobytes(), cut.event_bytes)
        self._append_fork(cut)

    def _append_fork(self, cut: Cut) -> None:
        record = np.zeros(1, RECORD)
        record["kind"], record["step"] = Kind.FORK, self._step
        record["g_begin"] = record["g_end"] = self._g
        try:
            self._append_event(record, cut.payload, cut.unix_ns)
            self.sync()
            end_cut(self.folder)
        except BaseException:
            self.close()  # the next open cuts whatever was written without this record
            raise
        self._owed = None


def _whole(name: str, column: ArrayLike, shape: tuple[int, ...]) -> NDArray[Any]:
    values = np.asarray(column)
    if values.dtype.kind not in "iu" or values.shape != shape:
        raise LedgerError(
            f"{name} is {values.dtype} {list(values.shape)}, not integers {list(shape)}"
        )
    return values


def _write_all(descriptor: int, content: bytes | bytearray, path: Path) -> None:
    """Append all of `content`; the system may take it in parts."""
    try:
        done = os.write(descriptor, content)
        while done < len(content):
            done += os.write(descriptor, content[done:])
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _close(writer: LedgerWriter | None) -> None:
    if writer is None:
        return
    for name in ("_records", "_events", "_lock"):
        descriptor = getattr(writer, name)
        if descriptor >= 0:
            os.close(descriptor)
            setattr(writer, name, -1)
