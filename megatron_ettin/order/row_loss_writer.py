"""Writing the losses of a run's rows, in step with its ledger.

The losses of a step are written before its record, and made durable before the record of a
checkpoint. Going back to a checkpoint moves the losses after it to the fork that holds their
records, so the file never tells of rows that the ledger does not.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.order.row_losses import (
    CHUNK_ROWS,
    ENTRY,
    HEADER_BYTES,
    LOSSES_FILE,
    fork_losses,
    header,
    left_out_entries,
    read_first_row,
)
from megatron_ettin.publication import publish_bytes, publishing, remove_leftovers

_logger = logging.getLogger(__name__)


class RowLossWriter:
    """The only writer of a run's row losses: the process that holds the lock of the ledger."""

    def __init__(self, path: Path, g: int) -> None:
        """Open a file that ends before row `g`. Call `open` instead."""
        self.path = path
        self._durable_g = g
        self._descriptor = os.open(path, os.O_RDWR)

    @classmethod
    def open(cls, ledger: Path, g: int, *, fork: str | None, is_on: bool) -> Self | None:
        """Go on at row `g`, where the ledger goes on; None if no losses are to be written.

        Losses of later rows move to `fork`, the fork that the ledger's last record tells of; they
        go if it tells of none. So they do with `is_on` false, if an earlier session wrote some.

        Raises:
            RowLossError: the file is none of row losses.
        """
        path = ledger / LOSSES_FILE
        remove_leftovers(path)
        if not path.exists():
            if not is_on:
                return None
            publish_bytes(path, header(0))
        _cut(path, g, None if fork is None else fork_losses(ledger, fork))
        return cls(path, g) if is_on else None

    def write(self, g_begin: int, entries: NDArray[np.void]) -> None:
        """Write the entries [n] of the rows from `g_begin` on; the same again changes nothing.

        Raises:
            OSError: the disk refuses.
        """
        content, offset = memoryview(entries.tobytes()), _offset(g_begin)
        try:
            done = 0
            while done < len(content):
                done += os.pwrite(self._descriptor, content[done:], offset + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def leave_out(self, g_begin: int, g_end: int) -> None:
        """Write that rows [g_begin, g_end) are left out; OSError if the disk refuses."""
        for begin in range(g_begin, g_end, CHUNK_ROWS):
            self.write(begin, left_out_entries(min(CHUNK_ROWS, g_end - begin)))

    def sync(self) -> None:
        """Make all that was written durable."""
        os.fdatasync(self._descriptor)

    def describe(self, g: int) -> dict[str, Any]:
        """Return the rows up to `g` since the last checkpoint, and the SHA-256 of their entries."""
        digest = hashlib.sha256()
        for begin in range(self._durable_g, g, CHUNK_ROWS):
            count = min(CHUNK_ROWS, g - begin)
            digest.update(os.pread(self._descriptor, count * ENTRY.itemsize, _offset(begin)))
        return {"g_begin": self._durable_g, "g_end": g, "sha256": digest.hexdigest()}

    def begin_after_checkpoint(self, g: int) -> None:
        """Let the next description begin at row `g`: a record tells of the rows before it."""
        self._durable_g = g

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def _offset(g: int) -> int:
    return HEADER_BYTES + g * ENTRY.itemsize


def _cut(path: Path, g: int, fork: Path | None) -> None:
    """Cut a file before row `g`, after the rest was copied to the file of a fork.

    A fork whose file is there has its losses: what follows `g` then was never in a record.
    """
    with path.open("r+b") as file:
        read_first_row(path, file.read(HEADER_BYTES))
        size = os.fstat(file.fileno()).st_size
        if size < _offset(g):
            missing = max(size - HEADER_BYTES, 0) // ENTRY.itemsize
            _logger.warning("%s: has no losses of the rows %d to %d", path, missing, g - 1)
        if fork is not None and not fork.exists():
            file.seek(_offset(g))
            with publishing(fork) as temporary, temporary.open("wb") as copy:
                copy.write(header(g))
                shutil.copyfileobj(file, copy)
        if size > _offset(g):
            os.ftruncate(file.fileno(), _offset(g))
            os.fsync(file.fileno())
