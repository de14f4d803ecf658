"""Check that a run's record agrees with itself: chain, forks, sums, and the rest of the folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.order.ledger import Fork, Kind, Ledger, LedgerError
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.answer import Check
from megatron_ettin.queries.branches import Branch, read_branches
from megatron_ettin.queries.record import digest_hex
from megatron_ettin.queries.verify_folder import check_folder, read_side_files


@dataclass(frozen=True, kw_only=True)
class ChainCheck:
    """Result of the chain check, and the records that it read."""

    check: Check
    ledger: Ledger
    """The run's ledger; without records if it is damaged."""
    branches: list[Branch]
    """The ledger and all forks that could be read; empty if the ledger is damaged."""

    @property
    def is_damaged(self) -> bool:
        """True if the ledger could not be read, so that nothing can be compared with it."""
        return not self.branches


def check_chain(folder: Path) -> ChainCheck:
    """Read all of a run's ledger, and compare the other files of the folder with it.

    Raises:
        FileNotFoundError: the folder has no ledger.
    """
    check = Check(name="chain")
    # Read before the ledger: a running run writes to the ledger first, so whatever these files say
    # is in a ledger that is read later.
    run = RunFolder(folder)
    side_files = read_side_files(run)
    try:
        ledger = run.read_ledger()
    except LedgerError as error:
        check.fail(str(error))
        return ChainCheck(check=check, ledger=Ledger.empty(RunFolder(folder).ledger), branches=[])
    for torn, name in ((ledger.torn_bytes, "record"), (ledger.torn_event_bytes, "event")):
        if torn:
            check.notes.append(
                f"{torn} bytes of an unfinished {name} follow the last one: the run is writing, or "
                f"was ended by force"
            )
    branches = read_branches(ledger, check)
    check.items = sum(len(branch.ledger.records) for branch in branches)
    for branch in branches:
        if branch.fork is not None:
            check.notes.append(_describe_fork(branch.fork))
        check.notes += _passed_over(branch.ledger)
        _check_sums(branch, check)
    check_folder(run, side_files, branches, check)
    check.notes += _missing(run, ledger)
    return ChainCheck(check=check, ledger=ledger, branches=branches)


def require_sound(folder: Path) -> Ledger:
    """Return a run's ledger; raise ValueError with the first fault if its chain check fails."""
    chain = check_chain(folder)
    if chain.check.failures:
        more = chain.check.failures - 1
        others = f" (and {more} more)" if more else ""
        raise ValueError(
            f"{folder}: its record is wrong, so it is compared with nothing: "
            f"{chain.check.faults[0]}{others}; see `verify --chain`"
        )
    return chain.ledger


def _describe_fork(fork: Fork) -> str:
    return (
        f"the run went back to record {fork.parent_seq}: {fork.records} records ({fork.steps} "
        f"steps) are kept in {fork.file}"
    )


def _check_sums(branch: Branch, check: Check) -> None:
    """Compare the sums in the payloads of events with the sums of the steps before them."""
    where = "" if branch.fork is None else f"fork {branch.fork.file}: "
    seqs = branch.ledger.steps["seq"].astype(np.int64)
    for seq, payload in branch.ledger.events.items():
        if "token_digest" not in payload:
            continue
        sums = branch.sums_of(int(np.searchsorted(seqs, seq)))
        expected: dict[str, Any] = {
            "tokens": sums.tokens,
            "order_digest": digest_hex(sums.order_digest),
            "token_digest": digest_hex(sums.token_digest),
        }
        for name, value in expected.items():
            if payload[name] != value:
                what = f"its {name} is {payload[name]}, but the steps before it sum to {value}"
                check.fail(where + what, seq=seq)


def _missing(run: RunFolder, ledger: Ledger) -> list[str]:
    """Return notes on what a complete run would have: an END, and all checkpoints of the ledger."""
    notes = []
    kinds = ledger.records["kind"]
    last = kinds[kinds != Kind.FORK][-1:].tolist()
    if last != [Kind.END]:
        notes.append("no END record: the run goes on, was ended by force, or waits to be resumed")
    names = [point.payload["name"] for point in ledger.checkpoints()]
    gone = [name for name in names if not (run.checkpoints / name).is_dir()]
    known = run.removed_checkpoints() if gone else set()  # reads all of metrics.jsonl
    removed = [name for name in gone if name in known]
    for which, state in (
        (removed, "were removed by checkpoint.keep"),
        ([name for name in gone if name not in removed], "are gone"),
    ):
        if which:
            notes.append(f"{len(which)} of {len(names)} checkpoints {state}: {_listed(which)}")
    return notes


def _passed_over(ledger: Ledger) -> list[str]:
    """Return a note on each RESUME that passed over damaged checkpoints."""
    return [
        f"record {seq}: the run went on from {payload.get('from_checkpoint')}, because later "
        f"checkpoints were damaged: {_listed(payload['set_aside'])}"
        for seq, payload in ledger.events.items()
        if payload.get("set_aside")
    ]


def _listed(names: Sequence[str], shown: int = 5) -> str:
    more = [f"and {len(names) - shown} more"] if len(names) > shown else []
    return ", ".join([*names[:shown], *more])
