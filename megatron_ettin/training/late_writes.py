"""Writes that a full or read-only disk refuses: kept in memory, in order, and tried again."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

#: Errors that may pass: no room, quota or file size used up, read-only, a device that fails.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
#: Time between two messages about the same file.
MESSAGE_SECONDS = 60.0


class LateWrites:
    """Writes to one place. Those that wait are lost only with the process."""

    def __init__(self, path: Path) -> None:
        """Start with nothing that waits; messages name `path`."""
        self._path = path
        self._waiting: deque[Callable[[], None]] = deque()
        self._said = -MESSAGE_SECONDS

    def write(self, action: Callable[[], None]) -> None:
        """Do what waits, then `action`; what the disk refuses waits for the next call.

        An action that fails must have written nothing.

        Raises:
            OSError: another error than those of a disk that is full, read-only or failing.
        """
        self._waiting.append(action)
        error = self._do_all()
        if error is not None and time.monotonic() - self._said >= MESSAGE_SECONDS:
            self._said = time.monotonic()
            logger.error(
                "%s: cannot be written (%s): the run goes on, %d writes wait in memory; make room",
                *(self._path, error.strerror, len(self._waiting)),
            )

    def settle(self) -> None:
        """Do what waits.

        Raises:
            OSError: the disk still refuses; the writes go on waiting.
        """
        error = self._do_all()
        if error is not None:
            raise OSError(error.errno, error.strerror, error.filename or str(self._path))

    def _do_all(self) -> OSError | None:
        """Do what waits, up to the first write that is refused; return its error."""
        waited = len(self._waiting) > 1
        while self._waiting:
            try:
                self._waiting[0]()
            except OSError as error:
                if error.errno not in PASSING:
                    raise
                return error
            self._waiting.popleft()
        if waited:
            self._said = -MESSAGE_SECONDS
            logger.warning("%s: written again, nothing is missing", self._path)
        return None


class LineFile:
    """A file of lines that is appended to; a line that fails leaves nothing behind."""

    def __init__(self, path: Path) -> None:
        """Open a file that ends with a whole line, or create it."""
        self._file = path.open("ab", buffering=0)
        self._whole_bytes = path.stat().st_size
        self._is_torn = False

    def append(self, line: str) -> None:
        """Append a line durably.

        Raises:
            OSError: the disk refuses; the file ends where it ended before, at the latest after the
                next call.
        """
        content = (line + "\n").encode()
        if self._is_torn:
            self._cut()
        self._is_torn = True
        try:
            done = 0
            while done < len(content):
                done += self._file.write(content[done:])
            os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):  # a read-only disk refuses this too
                self._cut()
            raise
        self._is_torn = False
        self._whole_bytes += len(content)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _cut(self) -> None:
        os.ftruncate(self._file.fileno(), self._whole_bytes)
        self._is_torn = False
