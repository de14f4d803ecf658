"""Local repositories of models with revisions: git, and the cache that huggingface_hub reads.

Below a root, the repository NAME is two folders. `NAME.git` is a bare git repository with a branch
for each revision; weights are pointers of git LFS in it, as on the Hub. `models--NAME` is a cache
of huggingface_hub, from which `from_pretrained(NAME, revision=..., cache_dir=root)` loads without a
network: it ignores the revision of any other folder. The weights are on the disk once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Self

from megatron_ettin.export.git import Git
from megatron_ettin.file_digests import FileDigest
from megatron_ettin.file_lock import open_locked
from megatron_ettin.publication import rename_durably, sync

#: Trailer of a commit's message that holds the digest of what the revision was made of.
FILES_TRAILER = "Checkpoint-Files"
MAIN = "main"
#: Names of files that the Hub keeps in LFS, in the order of the .gitattributes that it writes.
# fmt: off
LFS_PATTERNS = (
    "*.7z", "*.arrow", "*.bin", "*.bz2", "*.ckpt", "*.ftz", "*.gz", "*.h5", "*.joblib", "*.lfs.*",
    "*.mlmodel", "*.model", "*.msgpack", "*.npy", "*.npz", "*.onnx", "*.ot", "*.parquet", "*.pb",
    "*.pickle", "*.pkl", "*.pt", "*.pth", "*.rar", "*.safetensors", "saved_model/**/*", "*.tar.*",
    "*.tar", "*.tflite", "*.tgz", "*.wasm", "*.xz", "*.zip", "*.zst", "*tfevents*",
)
# fmt: on
GIT_ATTRIBUTES = "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LFS_PATTERNS)


class HubRepository:
    """A repository, locked against other writers while the `with` block runs.

    A revision appears in the cache when all of it is there, and then as a branch. So a process may
    be killed at any moment: what it left is whole, or is made again.
    """

    def __init__(self, root: Path, name: str) -> None:
        """Name the folders below `root`; nothing is read or written before the `with` block."""
        self.root, self.name = root, name
        self.cache = root / f"models--{name}"
        self.work = self.cache / "unfinished"
        self._git = Git(root / f"{name}.git")

    def __enter__(self) -> Self:
        """Create the folders if they are not there, and remove what a killed writer left.

        Raises:
            ValueError: another process writes, git is missing, or git refuses.
        """
        self._git.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = open_locked(
                self._git.folder / "series.lock", os.O_CREAT | os.O_RDWR, wait=False
            )
        except BlockingIOError as error:
            raise ValueError(f"{self._git.folder}: another process writes to it") from error
        try:
            self._git.create(MAIN)
            shutil.rmtree(self.work, ignore_errors=True)
            for folder in (self.work, *map(self.cache.joinpath, ("blobs", "refs", "snapshots"))):
                folder.mkdir(parents=True, exist_ok=True)
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the working folder and unlock."""
        shutil.rmtree(self.work, ignore_errors=True)
        os.close(self._lock)

    def revisions(self) -> dict[str, str]:
        """Return, by the name of each revision, the digest of what it was made of."""
        return {name: digest for name, (_, digest) in self._branches().items()}

    def is_whole(self, revision: str) -> bool:
        """Tell whether the cache has the revision that the branch names."""
        commit, ref = self._branches()[revision][0], self.cache / "refs" / revision
        return ref.is_file() and ref.read_text() == commit and self._snapshot(commit).is_dir()

    def snapshot(self, revision: str) -> Path:
        """Return the folder of a revision's files, links to the cache's blobs."""
        return self._snapshot(self._branches()[revision][0])

    def description(self, revision: str) -> str:
        """Return the message of a revision's commit."""
        return self._git.message(self._branches()[revision][0])

    def publish(self, revision: str, folder: Path, record: Mapping[str, str]) -> None:
        """Move the files of `folder`, which lies in `work`, to a revision.

        `record` becomes the trailers of the commit; it has FILES_TRAILER. The commit has no parent
        and a fixed date, so its id follows from files and record alone.
        """
        (folder / ".gitattributes").write_text(GIT_ATTRIBUTES)
        objects, blobs = {}, {}
        for path in sorted(folder.iterdir()):
            objects[path.name], blobs[path.name] = self._store(path)
        message = "\n".join([revision, "", *(f"{key}: {record[key]}" for key in record), ""])
        commit = self._git.commit(objects, message)
        shutil.rmtree(folder)
        self._link(commit, blobs)
        self._point(revision, commit)

    def point_main(self, revision: str) -> None:
        """Let the branch main, which `from_pretrained` loads by default, be a revision."""
        self._point(MAIN, self._branches()[revision][0])

    def _store(self, path: Path) -> tuple[str, str]:
        """Store a file; return the id of its git object and the name of its blob in the cache."""
        if not any(fnmatch(path.name, pattern) for pattern in LFS_PATTERNS):
            stored = self._git.store(path.read_bytes())
            self._keep(path, stored)
            return stored, stored
        size, sha256 = FileDigest.of_file(path)
        blob = self._keep(path, sha256)
        large = self._git.folder / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256
        large.parent.mkdir(parents=True, exist_ok=True)
        if not large.exists():
            os.link(blob, large)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return self._git.store(pointer.encode()), sha256

    def _keep(self, path: Path, name: str) -> Path:
        """Move a file to the cache's blobs; a blob of this name has the same content."""
        blob = self.cache / "blobs" / name
        if not blob.exists():
            sync(path)
            rename_durably(path, blob)
        return blob

    def _link(self, commit: str, blobs: Mapping[str, str]) -> None:
        if self._snapshot(commit).is_dir():
            return
        # As deep as the snapshot, so that the relative links hold in both places.
        unfinished = self.work / commit
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for name, blob in blobs.items():
            (unfinished / name).symlink_to(Path("..", "..", "blobs", blob))
        sync(unfinished)
        rename_durably(unfinished, self._snapshot(commit))

    def _point(self, name: str, commit: str) -> None:
        # huggingface_hub takes every file in refs/ for a revision, and its content as it is.
        unfinished = self.work / "ref"
        unfinished.write_text(commit)
        sync(unfinished)
        rename_durably(unfinished, self.cache / "refs" / name)
        self._git.point(name, commit)

    def _snapshot(self, commit: str) -> Path:
        return self.cache / "snapshots" / commit

    def _branches(self) -> dict[str, tuple[str, str]]:
        return self._git.branches(FILES_TRAILER)
