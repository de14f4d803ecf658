"""Lock of a run folder: one process at a time trains there; it ends with its owner."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ettin.file_lock import open_locked
from megatron_ettin.order.ledger.format import LOCK_FILE, LedgerError


def lock_ledger(folder: Path) -> int:
    """Return a descriptor that holds the lock; the kernel releases it when the process ends.

    Raises:
        LedgerError: another process holds it; the message says which on which host.
    """
    path = folder / LOCK_FILE
    try:
        descriptor = open_locked(path, os.O_RDWR | os.O_CREAT, wait=False)
    except BlockingIOError as error:
        holder = path.read_text(errors="replace").strip() or "a process"
        raise LedgerError(
            f"{path}: {holder} is writing this ledger; wait for its end, or end it"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor


def refuse_second_run(folder: Path) -> None:
    """Raise LedgerError if another process trains in the run of this ledger; write nothing new.

    It is an early look: a run locks the ledger when it opens it, minutes later.
    """
    if (folder / LOCK_FILE).is_file():
        os.close(lock_ledger(folder))


@contextmanager
def hold_ledger(folder: Path) -> Iterator[None]:
    """Keep writers out of a ledger during the block; its folder is made if it is not there.

    Raises:
        LedgerError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = lock_ledger(folder)
    try:
        yield
    finally:
        os.close(descriptor)
