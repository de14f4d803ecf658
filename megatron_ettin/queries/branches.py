"""All records of a run: those of its ledger, and those of the forks that resuming cut off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.order.ledger import Fork, Ledger, LedgerError
from megatron_ettin.queries.answer import Check


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over a run's first steps; digests are [2], low lane first."""

    tokens: int
    order_digest: NDArray[np.uint64]
    token_digest: NDArray[np.uint64]


_NOTHING = Sums(
    tokens=0,
    order_digest=np.zeros(2, dtype=np.uint64),
    token_digest=np.zeros(2, dtype=np.uint64),
)


@dataclass(frozen=True)
class Branch:
    """A ledger, or a fork with the sums of the steps before its first record."""

    ledger: Ledger
    fork: Fork | None = None
    """FORK record that names the fork; None for the ledger."""
    parted_seq: int | None = None
    """First record number of the fork at which the present ledger differs; None for the ledger."""
    before: Sums = _NOTHING

    @cached_property
    def _sums(self) -> dict[str, NDArray[np.uint64]]:
        names = ("n_tokens", "order_digest", "token_digest")
        return {name: self.ledger.cumulative(name) for name in names}

    def sums_of(self, count: int) -> Sums:
        """Return the sums over all steps up to number `count` of this branch."""
        if count == 0:
            return self.before
        return Sums(
            tokens=self.before.tokens + int(self._sums["n_tokens"][count - 1]),
            order_digest=self.before.order_digest + self._sums["order_digest"][count - 1],
            token_digest=self.before.token_digest + self._sums["token_digest"][count - 1],
        )

    def index_of_step(self, step: int) -> int | None:
        """Return the index of a step among this branch's steps; None if it is not among them."""
        steps = self.ledger.steps["step"]
        index = step - int(steps[0]) if len(steps) else -1
        return index if 0 <= index < len(steps) else None

    def cut_at(self, fork: Fork, ledger: Ledger) -> Branch:
        """Return the fork that going back cut off from this branch."""
        # The steps up to the parent record stayed in the ledger; the fork sums on from there.
        kept = np.searchsorted(self.ledger.steps["seq"].astype(np.int64), fork.parent_seq, "right")
        # A fork of a fork also lacks what the outer fork lost, so the earlier record counts.
        parted = fork.parent_seq + 1
        return Branch(
            ledger=ledger,
            fork=fork,
            parted_seq=parted if self.parted_seq is None else min(parted, self.parted_seq),
            before=self.sums_of(int(kept)),
        )


def read_branches(ledger: Ledger, check: Check) -> list[Branch]:
    """Return the ledger, its forks, and their forks; a missing or damaged fork is a fault."""
    return list(_branches(Branch(ledger), check))


def _branches(branch: Branch, check: Check) -> Iterator[Branch]:
    yield branch
    for fork in branch.ledger.forks():
        try:
            cut = branch.ledger.read_fork(fork)
        except FileNotFoundError as error:
            what = f"fork {fork.file}: {error.filename} is gone, but a FORK record names it"
            check.fail(f"{what}; restore it", seq=fork.seq)
        except (LedgerError, OSError) as error:
            check.fail(f"fork {fork.file}: {error}", seq=fork.seq)
        else:
            yield from _branches(branch.cut_at(fork, cut), check)
