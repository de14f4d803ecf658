"""Writes that a disk refuses: kept in order, said once, done later, and never half there."""

import errno
import logging
import os
from functools import partial
from pathlib import Path

import pytest

from megatron_ettin.training.late_writes import LateWrites, LineFile


class Disk:
    """A disk that refuses every write with `error`, if that is not 0."""

    def __init__(self) -> None:
        self.error = 0
        self.written: list[str] = []

    def write(self, text: str) -> None:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        self.written.append(text)


def test_what_is_refused_is_written_later_in_order(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    disk, late = Disk(), LateWrites(Path("RUN/metrics.jsonl"))
    for number, error in enumerate([0, errno.ENOSPC, errno.EROFS, errno.EDQUOT, 0, 0]):
        disk.error = error
        late.write(partial(disk.write, str(number)))
    assert disk.written == list("012345")
    first, last = caplog.messages
    assert first.startswith("RUN/metrics.jsonl: cannot be written (No space left on device)")
    assert last == "RUN/metrics.jsonl: written again, nothing is missing"


def test_settling_writes_all_or_fails(caplog: pytest.LogCaptureFixture) -> None:
    disk, late = Disk(), LateWrites(Path("RUN/ledger"))
    late.settle()
    disk.error = errno.ENOSPC
    for text in "ab":
        late.write(partial(disk.write, text))
    with pytest.raises(OSError, match="No space left on device: 'RUN/ledger'"):
        late.settle()
    disk.error = 0
    late.settle()
    assert disk.written == ["a", "b"]


def test_other_errors_are_raised() -> None:
    disk, late = Disk(), LateWrites(Path("RUN/ledger"))
    disk.error = errno.EBADF
    with pytest.raises(OSError, match="Bad file descriptor"):
        late.write(partial(disk.write, "a"))


def test_a_line_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when the line is written and not yet durable, once with a disk that cannot even cut."""
    path = tmp_path / "lines"
    path.write_text("before\n")
    lines, fsync, ftruncate = LineFile(path), os.fsync, os.ftruncate

    def refuse(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        lines.append("lost")
    assert path.read_text() == "before\n"
    monkeypatch.setattr(os, "ftruncate", refuse)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            lines.append("lost")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        lines.append("lost")
    monkeypatch.setattr(os, "ftruncate", ftruncate)
    lines.append("after")
    lines.close()
    assert path.read_text() == "before\nafter\n"
