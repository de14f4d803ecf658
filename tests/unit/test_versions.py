"""The commit that a run records is that of the source it runs from."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_ettin.versions import source_revision

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *words: str) -> str:
    """Run git as a person with a name and without settings."""
    name = {
        f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    done = subprocess.run(
        ["git", "-C", str(folder), *words],
        env={**os.environ, **name, "GIT_CONFIG_GLOBAL": os.devnull},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_a_checkout_has_its_commit_and_says_what_was_altered(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "--quiet")
    # In a checkout, and not of it.
    assert source_revision(package) is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    git(tmp_path, "tag", "--annotate", "v1", "--message", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert source_revision(package) == commit
    (tmp_path / "new").write_text("")
    assert source_revision(package) == commit
    (package / "__init__.py").write_text("altered = 1")
    assert source_revision(package) == f"{commit}-dirty"


def test_without_git_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source_revision(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_revision() is None
