"""Table of what the loaders did, in Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.loaders.cases import AXES, Axis
from benchmarks.loaders.outcomes import ResumeOutcome


@dataclass(kw_only=True)
class Tally:
    """Cases of one loader and one axis."""

    cases: int = 0
    clean: int = 0
    refused: int = 0
    failed: int = 0
    with_repeats: int = 0
    with_losses: int = 0
    with_changed_past: int = 0
    drawn: int = 0
    """Samples of the cases that resumed."""
    repeated: int = 0
    lost: int = 0
    changed_past: int = 0
    messages: dict[str, int] = field(default_factory=dict)
    """Errors, without numbers and paths, and how often each came."""

    def add(self, outcome: ResumeOutcome) -> None:
        """Count one case."""
        self.cases += 1
        self.clean += outcome.is_clean
        self.refused += outcome.verdict == "refused"
        self.failed += outcome.verdict == "failed"
        self.with_repeats += outcome.repeated > 0
        self.with_losses += outcome.lost > 0
        self.with_changed_past += outcome.changed_past > 0
        self.drawn += outcome.drawn
        self.repeated += outcome.repeated
        self.lost += outcome.lost
        self.changed_past += outcome.changed_past
        if outcome.message:
            # The numbers and names of a case differ, and its kind of error does not.
            kind = re.sub(r"\d+|/\S+", "N", outcome.message)[:120]
            self.messages[kind] = self.messages.get(kind, 0) + 1


def tally(outcomes: Mapping[tuple[Axis, int], ResumeOutcome]) -> dict[Axis, Tally]:
    """Return the counts of each axis that has cases."""
    tallies = {axis: Tally() for axis in AXES}
    for (axis, _), outcome in outcomes.items():
        tallies[axis].add(outcome)
    return {axis: counts for axis, counts in tallies.items() if counts.cases}


def report(
    tallies: Mapping[str, Mapping[Axis, Tally]], costs: Mapping[str, Mapping[str, Any]]
) -> str:
    """Return all tables, and the errors that loaders raised."""
    errors = [
        f"- {name}, {axis}, {count:,} times: {message}"
        for name, by_axis in tallies.items()
        for axis, counts in by_axis.items()
        for message, count in counts.messages.items()
    ]
    parts = [
        "Cases with a changed past / repeats / losses / an error:",
        resume_table(tallies),
        "Samples repeated:",
        share_table(tallies),
        "\n".join(errors) or "No loader raised an error.",
        cost_table(costs),
    ]
    return "\n\n".join(parts) + "\n"


def resume_table(tallies: Mapping[str, Mapping[Axis, Tally]]) -> str:
    """Return a table with a row for each loader and a column for each axis.

    A cell has the number of cases with a changed past, repeats, losses, and an error.
    """
    return _by_axis(
        tallies,
        lambda counts: (
            "0"
            if counts.clean == counts.cases
            else f"{counts.with_changed_past:,} / {counts.with_repeats:,} / "
            f"{counts.with_losses:,} / {counts.refused + counts.failed:,}"
        ),
    )


def share_table(tallies: Mapping[str, Mapping[Axis, Tally]]) -> str:
    """Return a table of the samples that were repeated, in percent of those that were drawn."""
    return _by_axis(
        tallies,
        lambda counts: f"{100 * counts.repeated / counts.drawn:.1f} %" if counts.drawn else "none",
    )


def _by_axis(tallies: Mapping[str, Mapping[Axis, Tally]], cell: Callable[[Tally], str]) -> str:
    rows = [
        (
            name,
            f"{min((counts.cases for counts in by_axis.values()), default=0):,}",
            *(cell(by_axis[axis]) if axis in by_axis else "none" for axis in AXES),
        )
        for name, by_axis in tallies.items()
    ]
    return as_markdown(("loader", "cases", *AXES), rows)


def cost_table(costs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with a row for each loader."""
    head = (
        "loader",
        "first batch ever, s",
        "first batch, s",
        "from process start, s",
        "M tokens/s",
        "memory, MB",
        "files, MB",
    )
    rows = [
        (
            name,
            f"{cost['cold_first_batch_cpu_s']:.3f}",
            f"{cost['first_batch_cpu_s']:.3f}",
            f"{cost['start_to_first_batch_cpu_s']:.1f}",
            f"{cost['tokens_per_cpu_s'] / 1e6:.1f}",
            f"{cost['memory_mb']:.0f}",
            f"{cost['kept_mb']:.1f}",
        )
        for name, cost in costs.items()
    ]
    return as_markdown(head, rows)


def as_markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
