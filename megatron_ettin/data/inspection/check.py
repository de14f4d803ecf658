"""Checks of a corpus and the verdict on all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PASS, FAIL, NOT_CHECKED = "PASS", "FAIL", "NOT CHECKED"
#: Faults and notes of a check that are listed one by one; the rest is counted.
LISTED = 20


@dataclass(kw_only=True)
class CorpusCheck:
    """A check and its result so far."""

    name: str
    compared: int = 0
    failures: int = 0
    faults: list[str] = field(default_factory=list)
    """First failures, LISTED at most."""
    skipped: int = 0
    """Comparisons that could not be made."""
    notes: list[str] = field(default_factory=list)
    """First reasons for that, LISTED at most."""

    @property
    def verdict(self) -> str:
        """PASS if something was compared and nothing failed."""
        if self.failures:
            return FAIL
        return PASS if self.compared else NOT_CHECKED

    def fail(self, what: str) -> None:
        """Count a failure."""
        self.failures += 1
        if len(self.faults) < LISTED:
            self.faults.append(what)

    def skip(self, what: str, count: int = 1) -> None:
        """Count comparisons that cannot be made, which is no failure."""
        self.skipped += count
        if len(self.notes) < LISTED:
            self.notes.append(what)

    def compare(self, today: object, recorded: object, what: str) -> None:
        """Count a comparison; fail if both differ."""
        self.compared += 1
        if today != recorded:
            self.fail(f"{what} is {today}, but {recorded} is recorded")

    @contextmanager
    def faults_of(self) -> Iterator[None]:
        """Count an error of the block as one failure; its message names the file."""
        try:
            yield
        except (ValueError, OSError, IndexError) as error:
            self.fail(str(error))

    def lines(self) -> Iterator[str]:
        """Yield the line of the result, then the faults and notes."""
        wrong = f", {self.failures} wrong" if self.failures else ""
        skipped = f", {self.skipped} not checked" if self.skipped else ""
        yield f"{self.name}: {self.verdict}, {self.compared} compared{wrong}{skipped}"
        yield from (f"  wrong: {fault}" for fault in self.faults)
        yield from (f"  not checked: {note}" for note in self.notes)
        if self.failures > len(self.faults):
            yield f"  wrong: {self.failures - len(self.faults)} more"
