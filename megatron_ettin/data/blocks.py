"""Blocks of whole lines of a raw file, plain or packed, in constant memory."""

import io
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, cast

from megatron_ettin.data.batches import BATCH_BYTES
from megatron_ettin.data.lines import DAMAGE, decompressed
from megatron_ettin.data.storage import READ_BYTES, RawFile, RawStream, file_name


class Block(NamedTuple):
    """Whole lines of a file, end to end; lines end at LF only, the last of a file perhaps not."""

    content: bytes
    first_line: int
    """Number of its first line in the file, from 1."""
    num_lines: int
    position: int
    """Bytes of the file read so far; of a compressed file, compressed bytes."""

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (number, line with its line end)."""
        return enumerate(io.BytesIO(self.content), self.first_line)


def read_blocks(file: RawFile) -> Iterator[Block]:
    """Yield a file in blocks of about BATCH_BYTES; a line that is longer is a block alone.

    ValueError naming file, line and byte, after the lines before, where packed data is truncated or
    damaged, or the file changed while it was read.
    """
    number = 1
    with file.open() as stream:
        source = unpacked(file, stream)
        try:
            for content in _whole_lines(source):
                num_lines = content.count(b"\n") + (not content.endswith(b"\n"))
                yield Block(content, number, num_lines, stream.position)
                number += num_lines
        except DAMAGE as error:
            file.check_size()
            raise ValueError(
                f"{file.path}: compressed data truncated or damaged after line {number - 1} (byte"
                f" {stream.position} of {file.size}): {error}; copy or download it again"
            ) from error
        stream.finish()


def unpacked(file: RawFile, stream: RawStream) -> BinaryIO:
    """Return the bytes that a file stands for; reading raises one of DAMAGE where they are bad."""
    if not file.format.endswith((".gz", ".zst", ".zstd")):
        return cast(BinaryIO, stream)
    # The decompressors ask for little at a time.
    buffered = io.BufferedReader(stream, READ_BYTES)
    return decompressed(file_name(file.path), cast(BinaryIO, buffered))


def _whole_lines(source: BinaryIO) -> Iterator[bytes]:
    """Yield the bytes of a stream, cut after an LF; after an error, what came before it first."""
    begun: list[bytes] = []  # pieces of a line whose end is not read yet
    failure: Exception | None = None
    while failure is None:
        fresh, failure = _read_piece(source)
        if not fresh:
            break
        end = fresh.rfind(b"\n") + 1
        if not end:
            begun.append(fresh)
            continue
        first = fresh.find(b"\n") + 1
        # A long line is alone: its text should not wait beside others.
        cut = first if sum(map(len, begun)) + first > BATCH_BYTES else end
        begun.append(fresh[:cut])
        content = b"".join(begun)
        begun = [fresh[end:]] if end < len(fresh) else []
        rest = fresh[cut:end]
        del fresh
        yield content
        del content
        if rest:
            yield rest
    if failure is not None:
        raise failure
    if begun:
        content = b"".join(begun)
        begun.clear()
        yield content


def _read_piece(source: BinaryIO) -> tuple[bytes, Exception | None]:
    """Return about BATCH_BYTES, fewer at the end or before an error, and that error."""
    pieces: list[bytes] = []
    size = 0
    failure = None
    read = source.read if isinstance(source, RawStream) else source.read1  # type: ignore[attr-defined]
    try:
        while size < BATCH_BYTES and (piece := read(BATCH_BYTES - size)):
            pieces.append(piece)
            size += len(piece)
    except DAMAGE as error:
        failure = error
    return pieces[0] if len(pieces) == 1 else b"".join(pieces), failure
