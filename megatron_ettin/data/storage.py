"""Raw files, local or behind a URL: their sizes, bytes and digests.

Local files are opened directly. Everything with `://` in its name goes through fsspec, which needs
a package for each kind of store.
"""

import contextlib
import glob
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, cast
from urllib.parse import urlsplit

from megatron_ettin.file_digests import FileDigest

SUFFIXES = (
    ".jsonl",
    ".jsonl.gz",
    ".jsonl.zst",
    ".json.gz",
    ".json.zst",
    ".parquet",
    ".arrow",
    ".csv",
    ".txt",
    ".mds",
    ".mds.gz",
    ".mds.zst",
    ".mds.zstd",
)
"""Suffixes of raw files; one decides how its file is read."""
READ_BYTES = 2**20
REMOTE_BLOCK_BYTES = 2**23

Kind = Literal["file", "folder"]


@dataclass
class RawFile:
    """One raw file. Two are equal if path and size are."""

    path: str
    """Local path or URL."""
    size: int
    """Bytes when the input was named. A reader refuses a file that has others at its end."""
    _digest: FileDigest | None = field(default=None, repr=False, compare=False)

    @property
    def format(self) -> str:
        """Suffix that decides how the file is read; ValueError if it is none of SUFFIXES."""
        name = file_name(self.path).lower()
        for suffix in SUFFIXES:
            if name.endswith(suffix):
                return suffix
        raise ValueError(
            f"{self.path}: no reader for this suffix; known are {', '.join(SUFFIXES)} (a file with"
            " one JSON object per line must be named .jsonl)"
        )

    @property
    def stamp(self) -> str:
        """Time of the last change, or what the store gives in its place: other for other bytes."""
        if not is_url(self.path):
            return str(os.stat(self.path).st_mtime_ns)
        with named_errors(self.path):
            system, name = file_system(self.path)
            return str(system.ukey(name))

    def open(self) -> "RawStream":
        """Open for one pass from front to back, which also takes the digest."""
        return RawStream(self)

    def open_at_random(self) -> BinaryIO:
        """Open for reading here and there."""
        if not is_url(self.path):
            return Path(self.path).open("rb")
        with named_errors(self.path):
            file, name = file_system(self.path)
            return file.open(name, "rb")

    def digest(self) -> FileDigest:
        """Return size and SHA-256, from the pass of a reader or else from one of its own.

        ValueError if the file has another size by now.
        """
        if self._digest is None:
            with self.open() as stream:
                while stream.read(READ_BYTES):
                    pass
                stream.finish()
        assert self._digest is not None
        return self._digest

    def check_size(self, num_read: int | None = None) -> None:
        """Refuse a file that is not as long as it was, or of which other bytes were read."""
        if is_url(self.path):
            with named_errors(self.path):
                system, name = file_system(self.path)
                # What it was is known; a store would answer from memory.
                system.invalidate_cache(parent(name))
        kind, now = look_up(self.path)
        if kind != "file" or now != self.size or num_read not in (None, self.size):
            read = "" if num_read is None else f", {num_read} bytes were read"
            raise ValueError(
                f"{self.path}: changed while it was in use: it had {self.size} bytes{read}, and now"
                f" has {now if kind else 'no'} bytes; try again when nothing writes to it"
            )


class RawStream(io.RawIOBase):
    """Bytes of a raw file, from front to back; counts and hashes them."""

    def __init__(self, file: RawFile) -> None:
        """Open the file; OSError naming it if that fails."""
        self._file = file
        self.position = 0
        """Bytes read so far."""
        self._sha256 = hashlib.sha256() if file._digest is None else None
        self._source: BinaryIO
        if is_url(file.path):
            with named_errors(file.path):
                system, name = file_system(file.path)
                # A web server may not give parts of a file; then all of it is asked for at once.
                whole = name.startswith("http") and not system.info(name).get("partial")
                size = 0 if whole else REMOTE_BLOCK_BYTES
                self._source = system.open(name, "rb", block_size=size, cache_type="readahead")
        else:
            self._source = cast(BinaryIO, io.FileIO(file.path))
            os.posix_fadvise(self._source.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def readable(self) -> bool:
        """Say yes."""
        return True

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes, none at the end."""
        with named_errors(self._file.path):
            data = self._source.read(size)
        self.position += len(data)
        if self._sha256 is not None:
            self._sha256.update(data)
        return data

    def readinto(self, buffer: "bytearray | memoryview", /) -> int:  # type: ignore[override]
        """Read up to the length of the buffer into it."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def finish(self) -> None:
        """Read what is left, note the digest; ValueError if the file changed its size meanwhile."""
        while self.read(READ_BYTES):
            pass
        self._file.check_size(self.position)
        if self._sha256 is not None:
            self._file._digest = FileDigest(self.position, self._sha256.hexdigest())

    def close(self) -> None:
        """Release the file."""
        if not self.closed:
            self._source.close()
        super().close()


def is_url(path: str) -> bool:
    """Say whether fsspec is responsible for a path."""
    return "://" in path


def file_name(path: str) -> str:
    """Return the last part of a path or URL, without the query of a web address."""
    return PurePosixPath(urlsplit(path).path if path.startswith("http") else path).name


def join(folder: str, name: str) -> str:
    """Return the path of a file in a folder; `name` itself if it is a URL or absolute."""
    if is_url(name):
        return name
    if is_url(folder):
        return name if name.startswith("/") else f"{folder.rstrip('/')}/{name}"
    return str(Path(folder) / name)


def parent(path: str) -> str:
    """Return the folder of a file."""
    return path.rpartition("/")[0] if is_url(path) else str(PurePosixPath(path).parent)


def look_up(path: str) -> tuple[Kind | None, int]:
    """Return what a path is, None if nothing is there, and the bytes of a file."""
    if not is_url(path):
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None, 0
        return ("folder", 0) if stat.S_ISDIR(status.st_mode) else ("file", status.st_size)
    with named_errors(path):
        system, name = file_system(path)
        try:
            info = system.info(name)
        except FileNotFoundError:
            return None, 0
    return _described(path, info)


def matches(pattern: str) -> list[tuple[str, Kind | None, int]]:
    """Return what a glob matches, sorted, each with what it is and the bytes of a file."""
    if not is_url(pattern):
        return [(name, *look_up(name)) for name in sorted(glob.glob(pattern, recursive=True))]
    with named_errors(pattern):
        system, name = file_system(pattern)
        # With the sizes: a question for each of thousands of files would take minutes.
        found = system.glob(name, detail=True)
        named = {system.unstrip_protocol(match): info for match, info in found.items()}
    # A web server lists names without sizes.
    return [
        (path, *(look_up(path) if info["size"] is None else _described(path, info)))
        for path, info in sorted(named.items())
    ]


def remember_folder(folder: str) -> None:
    """Ask a store for all files of a folder at once, so that it can answer for each of them."""
    if is_url(folder):
        with named_errors(folder):
            system, name = file_system(folder)
            system.ls(name, detail=True)


def _described(path: str, info: dict[str, Any]) -> tuple[Kind, int]:
    if info["type"] == "directory":
        return "folder", 0
    if info["size"] is None:
        raise ValueError(f"{path}: the server does not say how long it is; download it first")
    return "file", int(info["size"])


def read_content(path: str) -> bytes:
    """Return the bytes of a small file."""
    if not is_url(path):
        return Path(path).read_bytes()
    with named_errors(path):
        system, name = file_system(path)
        content: bytes = system.cat_file(name)
        return content


def file_system(path: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the name of the file in it."""
    # Imported here: local files do not need it.
    import fsspec

    try:
        system, name = fsspec.core.url_to_fs(path)
    except ImportError as error:
        protocol = path.partition("://")[0]
        raise ValueError(f"{path}: {protocol}:// needs a package: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return system, name


@contextlib.contextmanager
def opened_place(
    address: str, failure: type[Exception], *ours: type[Exception]
) -> Iterator[tuple[Any, str]]:
    """Yield fsspec's file system and the place that an address names in it, without caches.

    Errors of a store become `failure`, whose message names the address; those of `ours` pass.
    """
    try:
        system, root = file_system(address)
        system.invalidate_cache()
        yield system, root.rstrip("/")
    except (failure, *ours):
        raise
    except Exception as error:  # the clients of stores raise errors of their own
        raise failure(f"{address}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def named_errors(path: str) -> Iterator[None]:
    """Turn any error of a store into an OSError that names the file."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not is_url(path) or path in str(error):
            raise
        # The kind is kept: a missing file is handled apart.
        kind = type(error) if isinstance(error, FileNotFoundError | PermissionError) else OSError
        raise kind(f"{path}: cannot be read: {error}") from error
    except Exception as error:
        # The stores' clients raise errors of their own.
        if not is_url(path):
            raise
        raise OSError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error
