"""Does a run's record agree with itself: chain, forks, sums, checkpoints, order.json?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.file_digests import FileList
from megatron_ettin.order.digest import format_digest
from megatron_ettin.order.ledger import Fork, Head, Ledger, LedgerError
from megatron_ettin.queries.faults import Check
from megatron_ettin.queries.record import described, digests_at, read_ledger, read_spec


def check_chain(folder: Path) -> tuple[Check, Ledger | None]:
    """Read all of a run's ledger and compare with it what else the folder says.

    The ledger is None where it is damaged: nothing can be compared with it then.
    """
    check = Check(name="chain")
    try:
        ledger = read_ledger(folder)
    except LedgerError as error:
        check.fail(str(error))
        return check, None
    check.items = len(ledger.records)
    for torn, name in ((ledger.torn_bytes, "record"), (ledger.torn_event_bytes, "event")):
        if torn:
            check.notes.append(
                f"{torn} bytes of an unfinished {name} follow the last one: the run is writing, or "
                f"was ended by force"
            )
    forks: list[Ledger] = []
    _read_forks(ledger, check, forks)
    _check_sums(ledger, check)
    _check_order_file(folder, ledger, check)
    for state in checkpoint_states(folder):
        _check_checkpoint(state, ledger, forks, check)
    return check, ledger


def checkpoint_states(folder: Path) -> list[Path]:
    """Return the state.json of each finished checkpoint of a run."""
    found = sorted((folder / "checkpoints").glob("*/state.json"))
    return [state for state in found if state.parent.suffix != ".unfinished"]


def _read_forks(ledger: Ledger, check: Check, forks: list[Ledger]) -> None:
    """Verify the records that rewinds have cut off, and what was cut off from those."""
    for fork in ledger.forks():
        try:
            cut = ledger.read_fork(fork)
        except (LedgerError, OSError) as error:
            check.fail(f"fork {fork.file}: {error}", seq=fork.seq)
            continue
        check.items += len(cut.records)
        check.notes.append(_describe_fork(fork))
        forks.append(cut)
        _read_forks(cut, check, forks)


def _describe_fork(fork: Fork) -> str:
    return (
        f"the run went back to record {fork.parent_seq}: {fork.records} records ({fork.steps} "
        f"steps) are kept in {fork.file}"
    )


def _check_sums(ledger: Ledger, check: Check) -> None:
    """Compare the sums that events hold with those of the steps before them."""
    seqs = ledger.steps["seq"].astype(np.int64)
    sums = {name: ledger.cumulative(name) for name in ("order_digest", "token_digest", "n_tokens")}
    for seq, payload in ledger.events.items():
        if "token_digest" not in payload:
            continue
        last = int(np.searchsorted(seqs, seq)) - 1
        expected: dict[str, Any] = {"tokens": int(sums["n_tokens"][last]) if last >= 0 else 0}
        for name in ("order_digest", "token_digest"):
            low, high = sums[name][last].tolist() if last >= 0 else (0, 0)
            expected[name] = format_digest((low, high))
        for name, value in expected.items():
            if payload[name] != value:
                what = f"its {name} is {payload[name]}, but the steps before it sum to {value}"
                check.fail(what, seq=seq)


def _check_order_file(folder: Path, ledger: Ledger, check: Check) -> None:
    try:
        ids = read_spec(folder).phase_ids()
    except (ValueError, OSError) as error:
        check.fail(str(error))
        return
    known = described(ledger).get("phase_ids")
    if known != ids:
        what = f"{folder / 'order.json'}: its phase ids are not those that the ledger names"
        check.fail(what)


def _check_checkpoint(path: Path, ledger: Ledger, forks: list[Ledger], check: Check) -> None:
    """Compare a checkpoint's state with the record that it refers to."""
    try:
        state = json.loads(path.read_bytes())
        head = Head(state["ledger_seq"], state["ledger_chain"])
        found = {name: state[name] for name in ("step", "g", "consumed_tokens")}
        for name in ("order_digest", "token_digest"):
            low, high = state[name]
            found[name] = format_digest((low, high))
    except (ValueError, KeyError, TypeError) as error:
        check.fail(f"{path}: not the state of a run ({error})")
        return
    check.items += 1
    holder = next((part for part in (ledger, *forks) if part.holds(head)), None)
    if holder is None:
        what = f"{path}: its chain head is no record of this ledger, nor of one of its forks"
        check.fail(what, seq=head.seq)
        return
    _check_file_list(path, state, holder.events.get(head.seq, {}), head.seq, check)
    if holder is not ledger:
        check.notes.append(f"{path.parent.name} is of steps that the run went back on")
        return
    record = ledger.records[head.seq - int(ledger.records["seq"][0])]
    sums = digests_at(ledger, int(record["g_end"]))
    expected = {
        "step": int(record["step"]),
        "g": int(record["g_end"]),
        "consumed_tokens": sums.pop("tokens"),
        **sums,
    }
    for name, value in expected.items():
        if found[name] != value:
            what = f"{path}: {name} is {found[name]}, but its record says {value}"
            check.fail(what, seq=head.seq)


def _check_file_list(
    path: Path, state: dict[str, Any], recorded: dict[str, Any], seq: int, check: Check
) -> None:
    """Compare the list of a checkpoint's files, and its name, with the record that it refers to."""
    name, expected = recorded.get("name"), recorded.get("files_sha256")
    if name != path.parent.name:
        check.fail(f"{path}: its record is of checkpoint {name}", seq=seq)
    if expected is None and "files_sha256" not in state:
        check.notes.append(
            f"{path.parent.name} is of an earlier version: nothing was recorded of its files"
        )
        return
    try:
        found = FileList.from_document(state).sha256
    except ValueError as error:
        check.fail(f"{path}: {error}", seq=seq)
        return
    if found != expected:
        what = f"{path}: its list of files has SHA-256 {found}, but its record says {expected}"
        check.fail(what, seq=seq)
