"""A published file is on the device before it has its name; a failed one leaves nothing."""

import os
from pathlib import Path

import pytest

from megatron_ettin.publication import (
    begin_folder,
    is_unfinished,
    publish_bytes,
    publish_folder,
    publishing,
    remove_leftovers,
    unfinished_folder,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record each fsync as the name that its descriptor has then, and each rename as its target."""
    recorded: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor: int) -> None:
        recorded.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def recording_replace(source: Path, target: Path) -> None:
        recorded.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    return recorded


def test_a_file_is_synced_then_named_then_its_folder_synced(
    tmp_path: Path, calls: list[str]
) -> None:
    publish_bytes(tmp_path / "a", b"old")
    calls.clear()
    publish_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert calls[0].startswith("sync a.tmp.")
    assert calls[1:] == ["rename to a", f"sync {tmp_path.name}"]


def test_an_error_leaves_the_former_file_alone(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with publishing(tmp_path / "a") as temporary:
            temporary.write_bytes(b"half")
            raise ValueError("the second half")

    publish_bytes(tmp_path / "a", b"old")
    with pytest.raises(ValueError, match="the second half"):
        fail_half_way()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_leftovers_of_one_file_are_removed(tmp_path: Path) -> None:
    for name in ("a", "a.tmp.0123", "ab.tmp.0123"):
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "ab.tmp.0123"]


def test_every_file_of_a_folder_is_synced_before_the_folder_is_named(
    tmp_path: Path, calls: list[str]
) -> None:
    unfinished = begin_folder(tmp_path / "out")
    assert unfinished == unfinished_folder(tmp_path / "out")
    assert is_unfinished(unfinished)
    (unfinished / "inner").mkdir()
    (unfinished / "inner" / "deep").write_bytes(b"1")
    (unfinished / "top").write_bytes(b"2")
    publish_folder(tmp_path / "out")
    assert sorted(calls[:-2]) == ["sync deep", "sync inner", "sync out.unfinished", "sync top"]
    assert calls[-2:] == ["rename to out", f"sync {tmp_path.name}"]
    assert (tmp_path / "out" / "inner" / "deep").read_bytes() == b"1"


def test_a_folder_begins_without_what_a_killed_writer_left(tmp_path: Path) -> None:
    begin_folder(tmp_path / "out").joinpath("stale").write_bytes(b"")
    assert list(begin_folder(tmp_path / "out").iterdir()) == []
