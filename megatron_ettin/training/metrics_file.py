"""The file metrics.jsonl of a run that trains: whole lines, whatever the disk does."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class MetricsFile:
    """Appends lines; those that the disk refuses wait in memory for the next one."""

    def __init__(self, path: Path) -> None:
        """Open the file, which ends with a whole line."""
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def append(self, record: dict[str, Any]) -> None:
        """Append a line durably, after those that wait."""
        self._waiting += json.dumps(record).encode() + b"\n"
        self._try_to_write()

    def close(self) -> None:
        """Close the file; lines that the disk still refuses are lost, and logged as an error."""
        if self._waiting:
            self._try_to_write()
        self._file.close()

    def _try_to_write(self) -> None:
        descriptor = self._file.fileno()
        size = os.fstat(descriptor).st_size
        try:
            # The system may take it in parts.
            done = self._file.write(self._waiting)
            while done < len(self._waiting):
                done += self._file.write(self._waiting[done:])
            os.fsync(descriptor)
        except OSError as error:
            with suppress(OSError):  # a disk that takes no write may refuse this too
                os.ftruncate(descriptor, size)
            count = self._waiting.count(b"\n")
            logger.error("%s: %s: %d lines wait in memory", self._path, error.strerror, count)
        else:
            self._waiting = b""
