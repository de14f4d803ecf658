"""Blocks of whole lines of a raw file, plain or packed, in constant memory."""

import codecs
import io
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_ettin.data.batches import BATCH_BYTES
from megatron_ettin.data.lines import DAMAGE, decompressed
from megatron_ettin.data.storage import READ_BYTES, RawFile, RawStream, file_name


class LineBlock(NamedTuple):
    """Whole lines of a file, end to end; lines end at LF only, the last of a file perhaps not."""

    content: bytes
    first_line: int
    """Number of its first line in the file, from 1."""
    num_lines: int
    ends: NDArray[np.int64]
    """Place of each LF in the content."""
    position: int
    """Bytes of the file read so far; of a compressed file, compressed bytes."""

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (number, line with its line end)."""
        return enumerate(io.BytesIO(self.content), self.first_line)

    def is_utf8(self) -> bool:
        """Say whether the bytes are UTF-8; Arrow checks without making a string."""
        if self.content.isascii():
            return True
        offsets = (0).to_bytes(8, "little") + len(self.content).to_bytes(8, "little")
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(self.content)]
        try:
            pa.Array.from_buffers(pa.large_string(), 1, buffers).validate(full=True)
        except pa.ArrowInvalid:
            return False
        return True

    def without_mark(self) -> bytes:
        """Return the content, without the byte order mark if it is the file's beginning."""
        return self.content.removeprefix(codecs.BOM_UTF8) if self.first_line == 1 else self.content


def read_blocks(file: RawFile) -> Iterator[LineBlock]:
    """Yield a file in blocks of about BATCH_BYTES; a line that is longer is a block alone.

    ValueError naming file, line and byte, after the lines before, where packed data is truncated or
    damaged, or the file changed while it was read.
    """
    number = 1
    with file.open() as stream:
        source = unpacked(file, stream)
        try:
            for content in _whole_lines(source, stream.finish):
                ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n"))
                num_lines = len(ends) + (not content.endswith(b"\n"))
                block = [LineBlock(content, number, num_lines, ends, stream.position)]
                del content  # a long line would be held until the next one is asked for
                yield block.pop()
                number += num_lines
        except DAMAGE as error:
            file.check_size()
            raise ValueError(
                f"{file.path}: compressed data truncated or damaged after line {number - 1} (byte"
                f" {stream.position} of {file.size}): {error}; copy or download it again"
            ) from error


def unpacked(file: RawFile, stream: RawStream) -> BinaryIO:
    """Return the bytes that a file stands for; reading raises one of DAMAGE where they are bad."""
    if not file.format.endswith((".gz", ".zst", ".zstd")):
        return cast(BinaryIO, stream)
    # The decompressors ask for little at a time.
    buffered = io.BufferedReader(stream, READ_BYTES)
    return decompressed(file_name(file.path), cast(BinaryIO, buffered))


def _whole_lines(source: BinaryIO, finish: Callable[[], None]) -> Iterator[bytes]:
    """Yield the bytes of a stream, cut after an LF; after an error, what came before it first.

    `finish` is called at the end of the stream, before the last bytes: they may be half a line of a
    file that was cut meanwhile.
    """
    done = _Pieces()  # whole lines
    begun = _Pieces()  # a line whose end is not read yet
    failure: Exception | None = None
    # A packed source gives what it has; a plain one is a stream, which gives as much as it can.
    read = getattr(source, "read1", source.read)
    while failure is None:
        try:
            piece = read(max(1, BATCH_BYTES // 4))
        except DAMAGE as error:
            failure = error
            break
        if not piece:
            break
        view = memoryview(piece)
        first, last = piece.find(b"\n") + 1, piece.rfind(b"\n") + 1
        if first and begun.size + first > BATCH_BYTES:
            # A long line is alone: its text should not wait beside others.
            yield from done.take()
            begun.add(view[:first])
            yield from begun.take()
            view, last = view[first:], last - first
        if last:
            done.add(*begun.views, view[:last])
            begun.clear()
            if done.size >= BATCH_BYTES:
                yield from done.take()
        begun.add(view[last:])
    if begun.size > BATCH_BYTES or failure is not None:
        yield from done.take()
    if failure is not None:
        raise failure
    finish()
    done.add(*begun.views)
    begun.clear()
    yield from done.take()


class _Pieces:
    """Bytes that come in pieces, copied once."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.views: list[memoryview] = []
        self.size = 0

    def add(self, *views: memoryview) -> None:
        self.views += views
        self.size += sum(map(len, views))

    def take(self) -> Iterator[bytes]:
        """Yield the bytes, if there are any, and forget them."""
        if self.size:
            yield self._join()

    def _join(self) -> bytes:
        content = b"".join(self.views)
        # Before the reader uses them: it should not hold them twice.
        self.clear()
        return content
