"""Counts of what went wrong in a resumed run, from the samples that a loader delivered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Self

Verdict = Literal["resumed", "refused", "failed"]


class DrawnSample(NamedTuple):
    """A document that a loader delivered."""

    source: int
    document: int


@dataclass(frozen=True, kw_only=True)
class ResumeOutcome:
    """Result of one case."""

    verdict: Verdict
    """refused: an error before the first batch after the restart. failed: an error later."""
    drawn: int = 0
    """Samples of the whole run."""
    repeated: int = 0
    """Draws of a document beyond those that whole epochs over its source allow."""
    lost: int = 0
    """Draws that whole epochs over a source owe to a document, and that did not come."""
    changed_past: int = 0
    """Samples trained on before the stop that the new settings put elsewhere."""
    message: str = ""
    """Error of a refused or failed case."""

    @property
    def is_clean(self) -> bool:
        """Tell whether the run went on with nothing repeated, lost or changed."""
        bad = self.repeated + self.lost + self.changed_past
        return self.verdict == "resumed" and not bad

    def to_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Return the outcome with these fields."""
        return cls(**fields)


def count_outcome(
    sizes: Sequence[int],
    before: Sequence[DrawnSample],
    after: Sequence[DrawnSample],
    past: Sequence[DrawnSample],
) -> ResumeOutcome:
    """Compare the samples of a run with whole epochs, and its past with that of the new settings.

    If a source of n documents is drawn d times, each document is due floor(d / n) times and
    allowed ceil(d / n) times, in any order. So shuffling several epochs together is no fault as
    long as the counts come out even.

    Args:
        sizes: documents of each source.
        before: samples delivered until the stop.
        after: samples delivered from the restart to the end.
        past: samples of the first steps that the new settings take, len(before) or more in all.
    """
    drawn = Counter(before) + Counter(after)
    repeated = lost = 0
    for source, size in enumerate(sizes):
        counts = [drawn[DrawnSample(source, document)] for document in range(size)]
        due, rest = divmod(sum(counts), size)
        allowed = due + (rest > 0)
        repeated += sum(max(0, count - allowed) for count in counts)
        lost += sum(max(0, due - count) for count in counts)
    return ResumeOutcome(
        verdict="resumed",
        drawn=drawn.total(),
        repeated=repeated,
        lost=lost,
        changed_past=(Counter(before) - Counter(past)).total(),
    )
