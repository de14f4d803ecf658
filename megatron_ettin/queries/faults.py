"""What the queries that compare say: verdicts, remarks, and where something is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

PASS, FAIL = "PASS", "FAIL"

#: Failures of a check that are listed one by one; the others are counted.
FAULTS_KEPT = 20


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong; None where it belongs to no record, step or row."""

    what: str
    seq: int | None = None
    """Number of the ledger's record."""
    step: int | None = None
    rows: tuple[int, int] | None = None
    """Rows [begin, end) of the record."""
    row: int | None = None
    """The row g, where only one is possible."""

    def __str__(self) -> str:
        places = [
            f"{name} {value}"
            for name, value in (("record", self.seq), ("step", self.step), ("row", self.row))
            if value is not None
        ]
        if self.rows is not None and self.row is None:
            places.append(f"rows [{self.rows[0]}, {self.rows[1]})")
        return f"{', '.join(places)}: {self.what}" if places else self.what


@dataclass(kw_only=True)
class Check:
    """One of the questions that `verify` answers."""

    name: str
    items: int = 0
    """Records that were compared; for `chain` those of forks and the checkpoints too."""
    failures: int = 0
    faults: list[Fault] = field(default_factory=list)
    """The first of the failures."""
    notes: list[str] = field(default_factory=list)

    def fail(
        self,
        what: str,
        *,
        seq: int | None = None,
        step: int | None = None,
        rows: tuple[int, int] | None = None,
        row: int | None = None,
    ) -> None:
        """Count a failure, and keep it if it is among the first."""
        self.failures += 1
        if len(self.faults) < FAULTS_KEPT:
            self.faults.append(Fault(what=what, seq=seq, step=step, rows=rows, row=row))
