"""Rows that a run left out because a step went wrong, as the SKIP records of its ledger say.

A decision is in force from its record on, also where a return to an earlier checkpoint moved the
record to a fork: the run then comes to the same rows again, and leaves them out without asking. So
the ledger and its forks are all that a resumed run needs to know (docs/ledger.md, section 6).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from megatron_ettin.order.ledger.format import EVENTS_FILE, FORKS_FOLDER, RECORDS_FILE, Kind
from megatron_ettin.order.ledger.scan import scan
from megatron_ettin.order.spec import OrderSpec, PhaseSpec
from megatron_ettin.order.steps import pass_skipped_rows

Action = Literal["skip", "rewind"]
Reason = Literal["trouble.on_nan", "trouble.on_spike"]
#: Reason of a SKIP record whose rows the configuration names.
CONFIGURED = "data.skip_rows"
#: Fields of a record that a SkipRecord has.
RECORD_FIELDS = ("seq", "step", "phase", "g_begin", "g_end", "unix_ns")


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """A decision to leave out rows; its fields are the payload of the SKIP records of these."""

    reason: Reason
    """Setting that decided."""
    action: Action
    """skip: the run went on after these rows. rewind: it first went back to a checkpoint."""
    rows: tuple[int, int]
    """Rows [first, end), all in one phase."""
    phase_id: str
    """Chained id of the phase: in an amended order these numbers may be other rows."""
    step: int
    """Number that the step would have had that went wrong."""
    loss: float | None
    """Its mean loss per scored token; None if that was not finite."""
    gradient_norm: float | None
    """Norm of its gradients over all ranks; None if that was not finite."""
    z: float | None
    """Robust z-score of the loss; None if no window of losses was there to compare with."""

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self | None:
        """Return the decision that a SKIP record tells of; None if the configuration decided."""
        if not str(payload.get("reason", "")).startswith("trouble."):
            return None
        fields = {field.name: payload[field.name] for field in dataclasses.fields(cls)}
        first, end = fields["rows"]
        return cls(**{**fields, "rows": (int(first), int(end))})

    def payload(self) -> dict[str, Any]:
        """Return the payload of a SKIP record."""
        return {**dataclasses.asdict(self), "rows": list(self.rows)}

    def __str__(self) -> str:
        """Describe it in a line."""
        found = f"loss {_number(self.loss)}, gradient norm {_number(self.gradient_norm)}"
        z = "" if self.z is None else f", z {self.z:.3g}"
        first, end = self.rows
        return (
            f"{self.reason} ({self.action}) at step {self.step}: {found}{z}; "
            f"rows {first:,} to {end - 1:,} are left out"
        )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"


class SkipRecord(NamedTuple):
    """A SKIP record of a ledger, or of a fork."""

    fork: str | None
    """Name of the fork's files; None in the ledger."""
    seq: int
    step: int
    """Last step before it."""
    phase: int
    g_begin: int
    g_end: int
    unix_ns: int
    payload: dict[str, Any]


def read_skips(ledger: Path) -> list[SkipRecord]:
    """Return the SKIP records of the ledger in a folder, then those of its forks.

    Hashes are not compared: `Ledger.read` and `verify` do that.
    """
    found = list(_skips_of(ledger / RECORDS_FILE, ledger / EVENTS_FILE, 0, None))
    for records in sorted((ledger / FORKS_FOLDER).glob("fork_*.led")):
        # The name says the first record that was cut: fork_SEQ_DIGEST.
        first = int(records.stem.split("_")[1])
        found += _skips_of(records, records.with_suffix(".jsonl"), first, records.stem)
    return found


def _skips_of(
    records: Path, events: Path, first_seq: int, fork: str | None
) -> Iterator[SkipRecord]:
    if not records.is_file():
        return
    read = scan(records.read_bytes(), events.read_bytes(), first_seq=first_seq, verify=False)
    for record in read.records[read.records["kind"] == Kind.SKIP]:
        yield SkipRecord(
            fork=fork,
            **{name: int(record[name]) for name in RECORD_FIELDS},
            payload=read.payloads[int(record["seq"])],
        )


def read_interventions(ledger: Path) -> list[Intervention]:
    """Return the decisions that a run has made, the earliest first; none without a ledger."""
    decided: dict[tuple[tuple[int, int], str], Intervention] = {}
    for skip in sorted(read_skips(ledger), key=lambda skip: (skip.unix_ns, skip.seq)):
        intervention = Intervention.from_payload(skip.payload)
        if intervention is not None:
            # A replay records a decision again.
            decided.setdefault((intervention.rows, intervention.phase_id), intervention)
    return list(decided.values())


class SkippedRows:
    """The rows that a run leaves out: by `data.skip_rows`, and by interventions."""

    def __init__(
        self,
        configured: Sequence[tuple[int, int]],
        interventions: Iterable[Intervention],
        spec: OrderSpec,
    ) -> None:
        """Take the ranges of the configuration, and all decisions of the run.

        A decision about a phase that the order no longer has, because it was amended, is void.
        """
        self._configured = list(configured)
        self._spec = spec
        phase_ids = set(spec.phase_ids())
        self._decided = [each for each in interventions if each.phase_id in phase_ids]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """All ranges [first, end) by their first row; they may overlap."""
        return sorted([*self._configured, *(each.rows for each in self._decided)])

    def add(self, intervention: Intervention) -> None:
        """Take one more decision."""
        self._decided.append(intervention)

    def find(self, phase: PhaseSpec, g: int) -> tuple[int, Intervention | None] | None:
        """Return the end of the rows to leave out at `g` and who decided; None if none are.

        The rows of a decision go before those of the configuration, and the longer of two
        decisions before the other. Rows of the next phase are left to it.
        """
        at_g = [each for each in self._decided if each.rows[0] <= g < each.rows[1]]
        if at_g:
            decision = max(at_g, key=lambda each: each.rows[1])
            return min(decision.rows[1], phase.end_g), decision
        end = pass_skipped_rows(phase, self._configured, g)
        return (end, None) if end > g else None
