"""A bare git repository that this project alone writes, by git's plumbing commands."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

#: Author and committer of every commit. With a fixed date, a commit's id follows from its content.
IDENTITY = {
    f"GIT_{role}_{field}": value
    for role in ("AUTHOR", "COMMITTER")
    for field, value in (
        ("NAME", "megatron-ettin"),
        ("EMAIL", "megatron-ettin@localhost"),
        ("DATE", "@946684800 +0000"),
    )
}
#: Settings that keep a person's and the machine's configuration out.
ISOLATION = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "LC_ALL": "C"}


class Git:
    """A bare repository in `folder`; a failing command raises ValueError with git's message."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; `create` makes it."""
        self.folder = folder

    def create(self, branch: str) -> None:
        """Create the repository, with `branch` as HEAD, or complete it after a kill.

        The caller keeps other writers out: locks that a killed git left are removed.
        """
        locked = [self.folder / name for name in ("HEAD", "config", "packed-refs")]
        for lock in (*locked, *self.folder.glob("refs/heads/*.lock")):
            lock.with_suffix(".lock").unlink(missing_ok=True)
        self._run("init", "--quiet", "--bare", "--template=", f"--initial-branch={branch}")

    def store(self, content: bytes) -> str:
        """Store a file's content; return the id of its object."""
        return self._run("hash-object", "-w", "--stdin", given=content)

    def commit(self, files: Mapping[str, str], message: str) -> str:
        """Store a commit of one folder, ids of files by name, without parents; return its id."""
        lines = "".join(f"100644 blob {files[name]}\t{name}\n" for name in sorted(files))
        tree = self._run("mktree", given=lines.encode())
        return self._run("commit-tree", tree, given=message.encode())

    def point(self, branch: str, commit: str) -> None:
        """Let a branch, new or old, be a commit."""
        self._run("update-ref", f"refs/heads/{branch}", commit)

    def branches(self, trailer: str) -> dict[str, tuple[str, str]]:
        """Return, by branch, its commit and the value of a trailer of the commit's message."""
        value = f"%(contents:trailers:key={trailer},valueonly,separator=)"
        form = f"--format=%(refname:lstrip=2) %(objectname) {value}"
        lines = self._run("for-each-ref", form, "refs/heads").splitlines()
        named = (line.split(" ", 2) for line in lines)
        return {name: (commit, found.strip()) for name, commit, found in named}

    def message(self, commit: str) -> str:
        """Return a commit's message."""
        return self._run("cat-file", "commit", commit).partition("\n\n")[2]

    def _run(self, *arguments: str, given: bytes = b"") -> str:
        inherited = {name: os.environ[name] for name in os.environ if not name.startswith("GIT_")}
        command = ["git", f"--git-dir={self.folder}", "-c", "core.fsync=all", *arguments]
        try:
            done = subprocess.run(
                command,
                check=False,
                input=given,
                capture_output=True,
                env=inherited | ISOLATION | IDENTITY,
            )
        except FileNotFoundError as error:
            raise ValueError("git: no such program; install git 2.36 or newer") from error
        if done.returncode:
            raise ValueError(f"{self.folder}: git {arguments[0]}: {done.stderr.decode().strip()}")
        return done.stdout.decode().strip()
