"""Files that are hashed while they are written, and synced."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_ettin.file_digests import FileDigest
from megatron_ettin.publication import sync

#: Pieces of at least this size are hashed while they are written; a tensor is one piece.
PARALLEL_BYTES = 1 << 20


class HashingFiles(FileSystem):
    """Files on a disk, with the digests of those that were written, by name."""

    def __init__(self) -> None:
        """Begin with no file."""
        self.digests: dict[str, FileDigest] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file to write; when the block ends it is synced, and `digests` has it.

        Raises:
            OSError: the disk refuses, naming the file.
        """
        path = Path(path)
        stream: _HashingStream | None = None
        try:
            with path.open(mode) as file, ThreadPoolExecutor(1) as thread:
                stream = _HashingStream(file, thread)
                yield stream
            sync(path)
        except Exception as error:
            # Torch hides an error of the disk behind its own, and a failed write names no file.
            refusal = (stream and stream.refusal) or error
            if not isinstance(refusal, OSError):
                raise
            raise OSError(refusal.errno, refusal.strerror, str(path)) from error
        self.digests[path.name] = stream.digest()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Give a file that was written its final name."""
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _HashingStream(io.IOBase):
    """A file that is written from its beginning to its end, and hashed meanwhile."""

    def __init__(self, file: IO[Any], thread: Executor) -> None:
        self._file = file
        self._thread = thread
        self._sha256 = hashlib.sha256()
        self._bytes = 0
        self.refusal: OSError | None = None
        """Error of the disk that ended a write."""

    def write(self, content: Any) -> int:
        """Write all of `content` (bytes or a buffer of bytes)."""
        try:
            return self._write(content)
        except OSError as error:
            self.refusal = error
            raise

    def _write(self, content: Any) -> int:
        size = len(content)
        if size < PARALLEL_BYTES:
            self._sha256.update(content)
            self._file.write(content)
        else:  # hashing and writing both release Python's lock, so they run at the same time
            hashed = self._thread.submit(self._sha256.update, content)
            self._file.write(content)
            hashed.result()
        self._bytes += size
        return size

    def digest(self) -> FileDigest:
        """Return the digest of what was written."""
        return FileDigest(self._bytes, self._sha256.hexdigest())

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._bytes

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
