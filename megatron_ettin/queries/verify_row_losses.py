"""Check of the losses of rows: each checkpoint's record has the SHA-256 of those before it."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ettin.order.row_losses import (
    ENTRY,
    HEADER_BYTES,
    RowLossError,
    RowLossReader,
    fork_losses,
)
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.answer import Check
from megatron_ettin.queries.branches import Branch
from megatron_ettin.queries.run_losses import CHUNK_ROWS


def check_row_losses(run: RunFolder, branches: list[Branch]) -> Check | None:
    """Compare the losses of a run and of its forks with their digests; None if none has any.

    A file that is gone is a note: a run goes on without it, and a second place has no copy of it.
    """
    check = Check(name="row losses")
    bound = False
    for branch in branches:
        found = [
            (seq, payload["row_losses"])
            for seq, payload in branch.ledger.events.items()
            if "row_losses" in payload
        ]
        bound |= bool(found)
        path = run.row_losses
        if branch.fork is not None:
            path = fork_losses(run.ledger, branch.fork.file)
        if found and path.is_file():
            _check_file(path, found, check)
        elif found:
            check.notes.append(f"{path} is gone, with the losses that {len(found)} records bind")
    return check if bound else None


def _check_file(path: Path, bound: list[tuple[int, dict[str, Any]]], check: Check) -> None:
    try:
        reader = RowLossReader.open(path)
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            digests = list(threads.map(partial(_digest, reader), (said for _, said in bound)))
    except (RowLossError, OSError) as error:
        check.fail(str(error))
        return
    for (seq, said), (digest, is_empty) in zip(bound, digests, strict=True):
        check.items += 1
        rows = (int(said["g_begin"]), int(said["g_end"]))
        if digest == said["sha256"]:
            continue
        if is_empty:
            check.notes.append(f"{path}: the losses of rows [{rows[0]}, {rows[1]}) are gone")
            continue
        byte = HEADER_BYTES + (rows[0] - reader.first_g) * ENTRY.itemsize
        what = (
            f"{path}: the entries from byte {byte} on have SHA-256 {digest}, not {said['sha256']}"
        )
        check.fail(f"{what}: restore them", seq=seq, rows=rows)


def _digest(reader: RowLossReader, said: dict[str, Any]) -> tuple[str, bool]:
    """Return the SHA-256 of the entries that a record speaks of, and whether all are holes."""
    digest, is_empty = hashlib.sha256(), True
    for begin in range(int(said["g_begin"]), int(said["g_end"]), CHUNK_ROWS):
        entries = reader.entries(begin, min(begin + CHUNK_ROWS, int(said["g_end"])))
        digest.update(entries.tobytes())
        is_empty = is_empty and not entries["word"].any()
    return digest.hexdigest(), is_empty
