"""One process at a time holds a lock; the next gets it when the descriptor is closed."""

import os
from pathlib import Path

import pytest

from megatron_ettin.file_lock import open_locked


def test_a_second_holder_is_refused_until_the_first_has_closed(tmp_path: Path) -> None:
    flags = os.O_RDWR | os.O_CREAT
    first = open_locked(tmp_path / "lock", flags)
    descriptors = set(os.listdir("/proc/self/fd"))
    with pytest.raises(BlockingIOError):
        open_locked(tmp_path / "lock", flags, wait=False)
    assert set(os.listdir("/proc/self/fd")) == descriptors, "the refused descriptor stays open"
    os.close(first)
    os.close(open_locked(tmp_path / "lock", flags, wait=False))
