"""Bytes read from the device to get random rows of a corpus that is not in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ettin.order import SampleOrder

MICRO_BATCH_ROWS = 64
TOKEN_BYTES = {"uint16": 2, "int32": 4}


@dataclass(frozen=True, kw_only=True)
class ColdReads:
    """Bytes that rows needed, and bytes that were read for them."""

    wanted_bytes: int
    """Bytes of the rows' tokens in the .bin, special tokens counted."""
    read_bytes: int
    """Bytes that this process had read from the device: .bin, .idx and plans, with readahead."""

    @property
    def ratio(self) -> float:
        """Bytes read for each byte wanted."""
        return self.read_bytes / self.wanted_bytes


def read_cold_rows(order: SampleOrder, num_rows: int) -> ColdReads:
    """Read the first rows of an order's first phase, which lie anywhere in its files.

    The files must not be in memory (`drop_from_memory`); the order may be open.
    """
    begin, tokens = device_bytes(), 0
    for first in range(0, num_rows, MICRO_BATCH_ROWS):
        g = np.arange(first, min(first + MICRO_BATCH_ROWS, num_rows), dtype=np.int64)
        tokens += int(order.rows(0, g).num_tokens.sum())
    size = max(TOKEN_BYTES[order.corpus(name).dtype] for name in order.source_names)
    return ColdReads(wanted_bytes=tokens * size, read_bytes=device_bytes() - begin)


def drop_from_memory(paths: Iterable[Path]) -> None:
    """Ask the kernel to forget the pages of files, and of these alone, as after a boot.

    Pages that a process has mapped stay, and some file systems keep all of them.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            # Dirty pages are not dropped, so they are written first.
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def device_bytes() -> int:
    """Return the bytes that this process has had read from devices, readahead included."""
    for line in Path("/proc/self/io").read_text().splitlines():
        name, _, value = line.partition(": ")
        if name == "read_bytes":
            return int(value)
    raise OSError("/proc/self/io: has no read_bytes; the kernel lacks CONFIG_TASK_IO_ACCOUNTING")
