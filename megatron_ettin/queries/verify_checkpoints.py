"""Checks of checkpoints: the state of each against the ledger, its files against their digests.

The state lists the digests of the checkpoint's other files, and the ledger holds the list's digest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.file_digests import FileList, differences, sha256_of_json, unlisted
from megatron_ettin.order.digest import format_digest
from megatron_ettin.order.ledger import Head
from megatron_ettin.order.run_folder import STATE_FILE, RunFolder
from megatron_ettin.queries.answer import Check
from megatron_ettin.queries.branches import Branch
from megatron_ettin.queries.record import digest_hex

#: Fields of a state that its `state_sha256`, which earlier versions lack, does not cover.
UNBOUND = {"files", "files_sha256", "state_sha256"}


def check_checkpoint(path: Path, content: bytes, branches: list[Branch], check: Check) -> None:
    """Compare a checkpoint's state with its record, in the ledger or in a fork.

    `path` is the checkpoint's state.json, and `content` its bytes.
    """
    try:
        state = json.loads(content)
        head = Head(state["ledger_seq"], state["ledger_chain"])
        held = {name: state[name] for name in ("step", "g", "consumed_tokens")}
        for name in ("order_digest", "token_digest"):
            low, high = state[name]
            held[name] = format_digest((low, high))
    except (ValueError, KeyError, TypeError) as error:
        check.fail(f"{path}: not the state of a run ({error})")
        return
    check.items += 1
    fields = {name: state[name] for name in state.keys() - UNBOUND}
    if (expected := state.get("state_sha256")) not in (None, found := sha256_of_json(fields)):
        check.fail(f"{path}: its fields have SHA-256 {found}, but state_sha256 is {expected}")
    holder = next((branch for branch in branches if branch.ledger.holds(head)), None)
    if holder is None:
        what = f"{path}: its chain head is no record of this ledger, nor of one of its forks"
        check.fail(what, seq=head.seq)
        return
    _check_file_list(path, state, holder.ledger.events.get(head.seq, {}), head.seq, check)
    if holder.fork is not None:
        check.notes.append(f"{path.parent.name} is of steps that the run went back on")
    for name, value in _recorded(holder, head.seq).items():
        if held[name] != value:
            what = f"{path}: {name} is {held[name]}, but its record says {value}"
            check.fail(what, seq=head.seq)


def _recorded(branch: Branch, seq: int) -> dict[str, Any]:
    record = branch.ledger.records[seq - int(branch.ledger.records["seq"][0])]
    steps = branch.ledger.steps["seq"].astype(np.int64)
    sums = branch.sums_of(int(np.searchsorted(steps, seq)))
    return {
        "step": int(record["step"]),
        "g": int(record["g_end"]),
        "consumed_tokens": sums.tokens,
        "order_digest": digest_hex(sums.order_digest),
        "token_digest": digest_hex(sums.token_digest),
    }


def _check_file_list(
    path: Path, state: dict[str, Any], recorded: dict[str, Any], seq: int, check: Check
) -> None:
    """Compare the list of a checkpoint's files, and its name, with its record."""
    name, expected = recorded.get("name"), recorded.get("files_sha256")
    if name != path.parent.name:
        check.fail(f"{path}: its record is of checkpoint {name}", seq=seq)
    if expected is None and "files_sha256" not in state:
        check.notes.append(
            f"{path.parent.name} is of an earlier version: nothing was recorded of its files"
        )
        return
    try:
        list_sha256 = FileList.from_document(state).sha256
    except ValueError as error:
        check.fail(f"{path}: {error}", seq=seq)
        return
    if list_sha256 != expected:
        what = (
            f"{path}: its list of files has SHA-256 {list_sha256}, but its record says {expected}"
        )
        check.fail(what, seq=seq)


def check_weights(folder: Path) -> Check:
    """Hash every file of every checkpoint in the folder, and compare it with the state's list."""
    check = Check(name="weights")
    for checkpoint in RunFolder(folder).complete_checkpoints():
        state = checkpoint / STATE_FILE
        try:
            document = json.loads(state.read_bytes())
            if "files_sha256" not in document:  # an old checkpoint, or a fault of the chain check
                check.notes.append(f"the files of {checkpoint.name} cannot be checked")
                continue
            listed = FileList.from_document(document)
        except (ValueError, TypeError, OSError) as error:
            check.fail(f"{state}: {error}")
            continue
        check.items += len(listed.files)
        for difference in [
            *differences(checkpoint, listed, listed.files),
            *unlisted(checkpoint, listed, beside=[STATE_FILE]),
        ]:
            check.fail(difference)
    return check
