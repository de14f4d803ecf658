"""SHA-256 of a folder's files: listed when they are written, compared before they are used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

#: Files hashed at the same time: more than a disk of today can feed.
MAX_THREADS = 16


class FileDigest(NamedTuple):
    """Size and SHA-256 (hexadecimal) of a file."""

    num_bytes: int
    sha256: str

    @classmethod
    def of_content(cls, content: bytes) -> Self:
        """Return the digest of a file that holds `content`."""
        return cls(len(content), hashlib.sha256(content).hexdigest())

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """Read a file once, in parts, and return its digest; OSError if it cannot be read."""
        with path.open("rb", buffering=0) as file:
            # Linux then reads twice as far ahead.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            digest = hashlib.file_digest(file, "sha256")
            return cls(file.tell(), digest.hexdigest())


@dataclass(frozen=True)
class FileList:
    """Files of a folder, by name, as they were written."""

    files: Mapping[str, FileDigest]

    @property
    def sha256(self) -> str:
        """SHA-256 of the list as JSON: keys sorted, no spaces, UTF-8 (`sha` in docs/order.md)."""
        return sha256_of_json(self._as_json())

    def to_document(self) -> dict[str, Any]:
        """Return the two fields of state.json that hold the list."""
        return {"files": self._as_json(), "files_sha256": self.sha256}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read the two fields that `to_document` returns.

        Raises:
            ValueError: there is no list, it has no digests, or it does not have its own digest.
        """
        try:
            files = {
                str(name): FileDigest(int(entry["bytes"]), str(entry["sha256"]))
                for name, entry in document["files"].items()
            }
            expected = document["files_sha256"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError("holds no SHA-256 of the files") from error
        listed = cls(dict(sorted(files.items())))
        if listed.sha256 != expected:
            raise ValueError(
                f"the list of files has SHA-256 {listed.sha256}, but files_sha256 is {expected}"
            )
        return listed

    def _as_json(self) -> dict[str, dict[str, Any]]:
        return {
            name: {"bytes": file.num_bytes, "sha256": file.sha256}
            for name, file in sorted(self.files.items())
        }


def sha256_of_json(value: object) -> str:
    """Return the SHA-256 of a value as JSON: keys sorted, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(folder: Path, listed: FileList, names: Iterable[str]) -> list[str]:
    """Compare files of `folder` with the list, in parallel; return a line for each that differs.

    `names` chooses among the listed files.
    """
    # Imported here: a question that hashes nothing starts faster without it.
    from concurrent.futures import ThreadPoolExecutor

    files = listed.files
    # The largest first: begun last, it would run alone at the end.
    chosen = sorted(names, key=lambda name: -files[name].num_bytes)
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        lines = threads.map(partial(_difference, folder), chosen, [files[name] for name in chosen])
        return [line for line in lines if line is not None]


def unlisted(folder: Path, listed: FileList, beside: Iterable[str]) -> list[str]:
    """Return a line for each file in `folder` that is neither listed nor among `beside`."""
    known = {*listed.files, *beside}
    return [
        f"{path}: is not one of the files that were written; remove it"
        for path in sorted(folder.iterdir())
        if path.name not in known
    ]


def _difference(folder: Path, name: str, written: FileDigest) -> str | None:
    path = folder / name
    try:
        size = path.stat().st_size
        if size != written.num_bytes:
            return f"{path}: has {size} bytes, but {written.num_bytes} were written"
        digest = FileDigest.of_file(path)
    except FileNotFoundError:
        return f"{path}: is missing, but {written.num_bytes} bytes were written"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    if digest != written:
        return f"{path}: has SHA-256 {digest.sha256}, but {written.sha256} was written"
    return None
