"""Check of the losses of rows: each checkpoint's record has the SHA-256 of those before it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.order.row_losses import (
    CHUNK_ROWS,
    ENTRY,
    HEADER_BYTES,
    RowLossError,
    RowLossReader,
    fork_losses,
)
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.answer import Check
from megatron_ettin.queries.branches import Branch


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
        # Imported here: it imports logging, which other checks of a chain do without.
        from concurrent.futures import ThreadPoolExecutor

        reader = RowLossReader.open(path)
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            digests = list(threads.map(partial(_digest, reader), (said for _, said in bound)))
    except (RowLossError, OSError) as error:
        check.fail(str(error))
        return
    for (seq, said), digest in zip(bound, digests, strict=True):
        check.items += 1
        rows = (int(said["g_begin"]), int(said["g_end"]))
        if digest == said["sha256"]:
            continue
        if _is_empty(reader, said):
            check.notes.append(f"{path}: the losses of rows [{rows[0]}, {rows[1]}) are gone")
            continue
        byte = HEADER_BYTES + (rows[0] - reader.first_g) * ENTRY.itemsize
        what = (
            f"{path}: the entries from byte {byte} on have SHA-256 {digest}, not {said['sha256']}"
        )
        check.fail(f"{what}: restore them", seq=seq, rows=rows)


def _digest(reader: RowLossReader, said: dict[str, Any]) -> str:
    """Return the SHA-256 of the entries that a record speaks of."""
    digest = hashlib.sha256()
    for begin, end in _chunks(said):
        digest.update(reader.entries(begin, end).view(np.uint8).data)
    return digest.hexdigest()


def _is_empty(reader: RowLossReader, said: dict[str, Any]) -> bool:
    """Tell whether all entries that a record speaks of are holes."""
    return not any(reader.entries(*rows)["word"].any() for rows in _chunks(said))


def _chunks(said: dict[str, Any]) -> Iterator[tuple[int, int]]:
    begin, end = int(said["g_begin"]), int(said["g_end"])
    for first in range(begin, end, CHUNK_ROWS):
        yield first, min(first + CHUNK_ROWS, end)
