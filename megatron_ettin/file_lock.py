"""An exclusive lock on a file, which the kernel releases however its holder ends."""

import fcntl
import os
from pathlib import Path


def open_locked(path: Path, flags: int, *, wait: bool = True) -> int:
    """Open a file, lock it, and return the descriptor; closing it releases the lock.

    `flags` are those of `os.open`. NFS locks only what is open for writing.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
        OSError: the file cannot be opened, or its file system has no locks.
    """
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
