"""Lines of plain, gzip or zstd text, in constant memory; the suffix says which."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

import zstandard

ZSTD_CHUNK_BYTES = 2**16
# `zstd --ultra --long=31` is the largest window that the command-line tool writes.
ZSTD_MAX_WINDOW_BYTES = 2**31

DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)
"""Errors of packed data that is truncated or damaged."""


def read_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its line end); lines end at LF only, a leading BOM is cut.

    ValueError naming file, line and byte where the data is not UTF-8, truncated or damaged.
    """
    number = 0
    try:
        for number, line in enumerate(decompressed(path.name, file), 1):
            yield number, _decode(path, number, line)
    except DAMAGE as error:
        raise ValueError(
            f"{path}: compressed data truncated or damaged after line {number} (byte {file.tell()}"
            f" of {path.stat().st_size}): {error}; copy or download it again"
        ) from error


def decompressed(name: str, file: BinaryIO) -> BinaryIO:
    """Return the bytes that a file stands for; its name's suffix says how they are packed.

    Reading raises one of DAMAGE where they are truncated or damaged.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if suffix in (".zst", ".zstd"):
        return cast(BinaryIO, io.BufferedReader(_ZstdStream(file)))
    return file


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of one or more zstd frames; EOFError if the last frame is truncated.

    zstandard's own stream reader accepts a truncated file silently.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW_BYTES)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        while not self._ready:
            self._compressed = self._compressed or self._file.read(ZSTD_CHUNK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is not complete")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _decode(path: Path, number: int, line: bytes) -> str:
    try:
        return decode_line(number, line)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}") from None


def decode_line(number: int, line: bytes) -> str:
    """Return the text of a line, without a BOM if it is the first.

    ValueError, without the place of the line, where it is not UTF-8.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"invalid UTF-8 at byte {error.start + 1} of the line"
            f" (0x{line[error.start]:02x}: {error.reason}); convert the file to UTF-8"
        ) from None
    return text.removeprefix("\ufeff") if number == 1 else text
