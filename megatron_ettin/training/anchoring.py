"""Anchoring of a ledger while a run trains: a thread writes heads to the anchor.

A place that fails or hangs stops no run: heads wait in memory and are written later.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from queue import SimpleQueue

from megatron_ettin.config import LoggingConfig
from megatron_ettin.data.anchor import Anchor, AnchorError
from megatron_ettin.order.ledger import Head
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.training.run_files import first_record
from megatron_ettin.training.start_checks import StartError

logger = logging.getLogger(__name__)

#: Time that the end of a run leaves to heads that are not written yet.
END_SECONDS = 60.0


def open_anchoring(settings: LoggingConfig, run: RunFolder) -> Anchoring | None:
    """Return what anchors the run's ledger; None if `logging.anchor` is not given.

    Raises:
        StartError: the anchor does not answer, or holds heads of another run.
    """
    if settings.anchor is None:
        return None
    anchor = Anchor(settings.anchor)
    try:
        owner = anchor.owner()
    except AnchorError as error:
        raise StartError(f"logging.anchor: {error}") from error
    if owner is not None and owner != first_record(run):
        raise StartError(
            f"logging.anchor: {anchor.address}: holds heads of another run: give another place"
        )
    return Anchoring(anchor, run, settings.anchor_every_seconds)


class Anchoring:
    """Writes heads of a run's ledger to an anchor, in the order in which they are given."""

    def __init__(self, anchor: Anchor, run: RunFolder, every_seconds: float) -> None:
        """Start the thread; it ends with `close` or with the process."""
        self._anchor, self._run, self._every_seconds = anchor, run, every_seconds
        self._due = time.monotonic()
        self._given: SimpleQueue[Head | None] = SimpleQueue()
        self._waiting: deque[Head] = deque()
        self._thread = threading.Thread(target=self._write, name="anchoring", daemon=True)
        self._thread.start()

    @property
    def is_due(self) -> bool:
        """Tell whether the interval since the last head is over."""
        return time.monotonic() >= self._due

    def add(self, head: Head) -> None:
        """Write a head that is durable in the ledger; returns at once."""
        self._due = time.monotonic() + self._every_seconds
        self._given.put(head)

    def close(self) -> None:
        """Wait for the heads that were given, but not longer than END_SECONDS."""
        self._given.put(None)
        self._thread.join(END_SECONDS)
        if self._thread.is_alive() or self._waiting:
            logger.error(
                "%s: the ledger's last heads are not anchored; keep the head that the run prints",
                self._anchor.address,
            )

    def _write(self) -> None:
        while (head := self._given.get()) is not None:
            self._waiting.append(head)
            self._write_waiting()
        self._write_waiting()

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                self._anchor.add(self._waiting[0], first_record(self._run) or "")
                self._waiting.popleft()
        except Exception as error:  # no error of a store may end the training
            logger.error("%s: the run goes on, %d heads wait", error, len(self._waiting))
