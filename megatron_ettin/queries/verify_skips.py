"""Checks of the rows that a run left out: its SKIP records, and their lines in metrics.jsonl."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_ettin.order.interventions import CONFIGURED, Intervention
from megatron_ettin.order.ledger import Kind
from megatron_ettin.queries.answer import Check
from megatron_ettin.queries.branches import Branch

#: Kinds of lines in metrics.jsonl that tell of an intervention: its actions.
KINDS = ("skip", "rewind")


def check_skips(branches: list[Branch], check: Check) -> None:
    """Compare each SKIP record, those of forks too, with the decision that its payload tells of."""
    decided: set[tuple[tuple[int, int], str]] = set()
    for branch in branches:
        for record in branch.ledger.records[branch.ledger.records["kind"] == Kind.SKIP]:
            seq, rows = int(record["seq"]), (int(record["g_begin"]), int(record["g_end"]))
            payload = branch.ledger.events[seq]
            where = f"fork {branch.fork.file}: " if branch.fork else ""
            try:
                intervention = Intervention.from_payload(payload)
            except (KeyError, TypeError, ValueError) as error:
                check.fail(f"{where}not the payload of an intervention ({error})", seq=seq)
                continue
            if intervention is None:
                continue
            first, end = intervention.rows
            if not first <= rows[0] < rows[1] <= end:
                what = f"{where}its decision is about rows [{first}, {end})"
                check.fail(what, seq=seq, rows=rows)
            decided.add((intervention.rows, intervention.phase_id))
    if decided:
        check.notes.append(
            f"the run left out rows by itself {len(decided)} times ({CONFIGURED} not counted): "
            f"`skips` lists them"
        )


def skip_fault(said: dict[str, Any], branches: list[Branch]) -> str | None:
    """Return how a line of metrics.jsonl about an intervention differs from every SKIP record."""
    try:
        begin, end = said["rows"]
        step, reason = said["step"], said["reason"]
    except (KeyError, TypeError, ValueError) as error:
        return f"not what a run reports ({error})"
    for branch in branches:
        records = branch.ledger.records
        same = (records["kind"] == Kind.SKIP) & (records["step"] == step)
        same &= (records["g_begin"] == begin) & (records["g_end"] == end)
        for seq in records["seq"][np.flatnonzero(same)].tolist():
            if branch.ledger.events[seq].get("reason") == reason:
                return None
    return f"rows [{begin}, {end}) left out after step {step}: no such SKIP record"
