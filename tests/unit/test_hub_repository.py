"""Repositories of revisions: whole after a kill at any moment, the same ids each time, one writer.

The files here are no models; tests/integration/test_series.py loads those.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import scan_cache_dir, snapshot_download

from megatron_ettin.export.hub_repository import (
    FILES_TRAILER,
    GIT_ATTRIBUTES,
    HubRepository,
)

#: Files of a revision; weights and text in one revision are those of another.
REVISIONS = {
    "step10": {"model.safetensors": b"\0" * 3000, "config.json": b"{}", "README.md": b"ten\n"},
    "step20": {"model.safetensors": b"\1" * 3000, "config.json": b"{}", "README.md": b"twenty\n"},
}
#: Calls of a process that change what is on the disk.
CHANGES = {"os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"} | {
    "open",
    "subprocess.Popen",
}
#: More than a write makes.
NUM_CHANGES = 210


def write(root: Path) -> dict[str, str]:
    """Publish what is missing, as a series does; return the commits by branch."""
    with HubRepository(root, "encoder") as repository:
        for name, files in REVISIONS.items():
            if name in repository.revisions() and repository.is_whole(name):
                continue
            folder = repository.work / "model"
            folder.mkdir()
            for file, content in files.items():
                (folder / file).write_bytes(content)
            repository.publish(name, folder, {FILES_TRAILER: f"digest of {name}"})
        repository.point_main(name)
    return branches(root)


def git(root: Path, *arguments: str) -> str:
    command = ["git", f"--git-dir={root / 'encoder.git'}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def branches(root: Path) -> dict[str, str]:
    lines = git(root, "for-each-ref", "--format=%(refname:lstrip=2) %(objectname)").splitlines()
    return dict(line.split() for line in lines)  # type: ignore[misc]


def assert_whole(root: Path) -> None:
    """Compare every revision that is there, in either form, with what it has to be."""
    refs = root / "models--encoder" / "refs"
    for ref in sorted(refs.iterdir()) if refs.is_dir() else []:
        expected = REVISIONS["step20" if ref.name == "main" else ref.name]
        found = Path(snapshot_download("encoder", revision=ref.name, cache_dir=root))
        files = {path.name: path.read_bytes() for path in found.iterdir()}
        assert files == expected | {".gitattributes": GIT_ATTRIBUTES.encode()}
    if not (root / "encoder.git" / "HEAD").is_file():
        return
    assert git(root, "fsck", "--full", "--strict", "--no-dangling") == ""
    for branch, commit in branches(root).items():
        assert (refs / branch).read_text() == commit


def write_and_die(root: Path, after: int) -> bool:
    """Write in a process that is killed before its change number `after`; tell if it was."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    left = after

    def count(event: str, _: Any) -> None:
        nonlocal left
        if event in CHANGES:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    try:
        write(root)
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write both revisions without a kill."""
    root = tmp_path_factory.mktemp("whole")
    write(root)
    return root


def test_revisions_are_what_was_published(whole: Path) -> None:
    assert_whole(whole)
    commits = branches(whole)
    assert commits.keys() == {"step10", "step20", "main"}
    assert commits["main"] == commits["step20"] != commits["step10"]
    with HubRepository(whole, "encoder") as repository:
        assert repository.revisions()["step10"] == "digest of step10"
        assert repository.description("step10") == "step10\n\nCheckpoint-Files: digest of step10"
    (scanned,) = scan_cache_dir(whole).repos
    assert scanned.refs.keys() == commits.keys()


def test_ids_follow_from_the_content(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a person's name and settings of git nor the time enter them."""
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Somebody")
    monkeypatch.setenv("GIT_AUTHOR_DATE", "2020-02-02T00:00:00Z")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_DEFAULT_HASH", "sha256")
    expected = branches(whole)
    write(tmp_path / "repo")
    monkeypatch.undo()
    assert branches(tmp_path / "repo") == expected
    assert not (tmp_path / "elsewhere").exists()


def test_files_that_revisions_share_are_there_once(whole: Path) -> None:
    """Two weights, two cards, one configuration, one .gitattributes."""
    assert len(list((whole / "models--encoder" / "blobs").iterdir())) == 6
    assert not (whole / "models--encoder" / "unfinished").exists()


def assert_kill_leaves_whole_revisions(after: int, whole: Path, root: Path) -> None:
    write_and_die(root, after)
    assert_whole(root)
    assert write(root) == branches(whole)
    assert_whole(root)


@pytest.mark.parametrize("after", range(7, NUM_CHANGES, 31))
def test_kill_leaves_whole_revisions(after: int, whole: Path, tmp_path: Path) -> None:
    assert_kill_leaves_whole_revisions(after, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("after", range(0, NUM_CHANGES, 3))
def test_kill_at_any_moment_leaves_whole_revisions(after: int, whole: Path, tmp_path: Path) -> None:
    assert_kill_leaves_whole_revisions(after, whole, tmp_path)


def test_kills_reach_the_end(tmp_path: Path) -> None:
    assert write_and_die(tmp_path / "early", NUM_CHANGES // 2)
    assert not write_and_die(tmp_path / "late", NUM_CHANGES)


def test_locks_of_a_killed_git_are_removed(whole: Path, tmp_path: Path) -> None:
    write(tmp_path)
    git(tmp_path, "update-ref", "-d", "refs/heads/step20")
    for name in ("HEAD.lock", "config.lock", "packed-refs.lock", "refs/heads/step20.lock"):
        (tmp_path / "encoder.git" / name).touch()
    assert write(tmp_path) == branches(whole)


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with (
        HubRepository(tmp_path, "encoder"),
        pytest.raises(ValueError, match="another process writes to it"),
        HubRepository(tmp_path, "encoder"),
    ):
        pass


def test_no_git_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(ValueError, match="git: no such program"),
        HubRepository(tmp_path, "encoder"),
    ):
        pass
