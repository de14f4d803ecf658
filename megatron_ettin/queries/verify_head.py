"""Find the record with a published chain hash, and count what happened since."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.order.ledger import Kind
from megatron_ettin.queries.answer import Check
from megatron_ettin.queries.branches import Branch

#: Fewest digits that name a record. A forger meets 12 digits in 2^48 tries; all 64 are a proof.
SHORTEST = 12


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Counts over consecutive records."""

    records: int
    steps: int
    rows: int
    """Rows that the steps consumed."""
    skipped_rows: int
    checkpoints: int
    resumed: int
    amended: int
    went_back: int
    """FORK records: how often the run went back to one of these records or to the one before."""
    ended: bool
    """True if END is the last of them, apart from FORK records."""

    def __str__(self) -> str:
        counts = {
            "records": self.records,
            "steps": self.steps,
            "rows": self.rows,
            "skipped rows": self.skipped_rows,
            "checkpoints": self.checkpoints,
            "resumed": self.resumed,
            "amended": self.amended,
            "went back": self.went_back,
        }
        told = [f"{name} {count}" for name, count in counts.items() if count]
        return ", ".join([*told, *(["ended"] if self.ended else [])]) or "nothing"


@dataclass(frozen=True, kw_only=True)
class FoundHead:
    """Record with the given chain hash."""

    chain: str
    """All 64 digits of its chain hash."""
    seq: int
    kind: str
    step: int
    g: int
    """First row after the record's rows."""
    fork: str | None
    """Fork that holds the record, because the run went back before it; None if the ledger does."""
    parted_seq: int | None
    """First record number at which ledger and fork differ; None without a fork."""
    since: Stretch
    """Records of the ledger after this one; if it is in a fork, those from `parted_seq` on."""
    undone: Stretch | None
    """Records after this one in its fork; None without a fork."""

    def lines(self) -> list[str]:
        """Return the answer as lines for people."""
        place = "in the ledger" if self.fork is None else f"in {self.fork}"
        what = f"record {self.seq}, {self.kind}, after step {self.step}, row {self.g}"
        if self.fork is None:
            return [f"head: {what}: {place}", f"  since then: {self.since}"]
        return [
            f"head: {what}: {place}, for the run went back before it",
            f"  the ledger has other records from {self.parted_seq} on: {self.since}",
            f"  undone with it, in its fork: {self.undone}",
        ]


def find_head(asked: str, branches: list[Branch]) -> tuple[Check, FoundHead | None]:
    """Look in the ledger and all forks for the record whose chain hash begins with `asked`.

    Raises:
        ValueError: not 12 to 64 hexadecimal digits, or several records match.
    """
    digits = asked.strip().lower()
    if not re.fullmatch(rf"[0-9a-f]{{{SHORTEST},64}}", digits):
        raise ValueError(
            f"--head {asked}: give the chain hash of a record, 64 hexadecimal digits, or its "
            f"first {SHORTEST} or more"
        )
    check = Check(name="head")
    matches = [
        (branch, index) for branch in branches for index in _records_with(digits, branch).tolist()
    ]
    check.items = sum(len(branch.ledger.records) for branch in branches)
    if not matches:
        what = f"no record of the ledger or of its forks has the chain hash {digits}"
        check.fail(what if branches else "nothing can be looked up in a ledger that is damaged")
        return check, None
    if len(matches) > 1:
        seqs = [int(branch.ledger.records["seq"][index]) for branch, index in matches]
        raise ValueError(f"--head {asked}: records {seqs} begin so; give more digits")
    return check, _describe_head(*matches[0], present=branches[0])


def _records_with(digits: str, branch: Branch) -> NDArray[np.intp]:
    """Return the indices of the records whose chain hash begins with these digits."""
    chains = branch.ledger.records["chain"]
    whole = np.frombuffer(bytes.fromhex(digits[: len(digits) // 2 * 2]), dtype=np.uint8)
    same = (chains[:, : len(whole)] == whole).all(axis=1)
    if len(digits) % 2:  # the last digit is the high half of a byte
        same &= chains[:, len(whole)] >> 4 == int(digits[-1], 16)
    return np.flatnonzero(same)


def _describe_head(branch: Branch, index: int, *, present: Branch) -> FoundHead:
    record = branch.ledger.records[index]
    after = _count_records(branch.ledger.records[index + 1 :])
    seqs = present.ledger.records["seq"]
    return FoundHead(
        chain=record["chain"].tobytes().hex(),
        seq=int(record["seq"]),
        kind=Kind(int(record["kind"])).name,
        step=int(record["step"]),
        g=int(record["g_end"]),
        fork=None if branch.fork is None else branch.fork.file,
        parted_seq=branch.parted_seq,
        since=after
        if branch.parted_seq is None
        else _count_records(present.ledger.records[seqs >= branch.parted_seq]),
        undone=None if branch.fork is None else after,
    )


def _count_records(records: NDArray[np.void]) -> Stretch:
    kinds = records["kind"]
    rows = (records["g_end"] - records["g_begin"]).astype(np.int64)

    def count(kind: Kind) -> int:
        return int(np.count_nonzero(kinds == kind))

    return Stretch(
        records=len(records),
        steps=count(Kind.STEP),
        rows=int(rows[kinds == Kind.STEP].sum()),
        skipped_rows=int(rows[kinds == Kind.SKIP].sum()),
        checkpoints=count(Kind.CHECKPOINT),
        resumed=count(Kind.RESUME),
        amended=count(Kind.AMEND),
        went_back=count(Kind.FORK),
        ended=kinds[kinds != Kind.FORK][-1:].tolist() == [Kind.END],
    )
