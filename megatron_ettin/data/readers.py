"""Records of raw files one by one, for callers that do not take batches yet."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_ettin.data import raw_files
from megatron_ettin.data.raw_files import READERS, OriginFields, RawFile, TokenBatch, read_batches

__all__ = ["READERS", "OriginFields", "Record", "expand_inputs", "file_format", "read_files"]


class Record(NamedTuple):
    """One raw document: the text of its fields, its origin, and how far the reader has come."""

    texts: tuple[str, ...]
    """Text of each field that was asked for, in that order."""
    id: str | None
    url: str | None
    path: Path
    line: int
    position: int
    """Bytes read so far, over all files."""


def expand_inputs(patterns: Sequence[str]) -> tuple[Path, ...]:
    """Return the local files that the patterns name, as `raw_files.expand_inputs`."""
    return tuple(Path(file.path) for file in raw_files.expand_inputs(patterns))


def file_format(path: Path) -> str:
    """Return the suffix under which `READERS` knows the file; ValueError where there is none."""
    return RawFile(str(path), 0).format


def read_files(
    paths: Sequence[Path], fields: Sequence[str], origin: OriginFields | None = None
) -> Iterator[Record]:
    """Yield the records of all files in order.

    ValueError as from `read_batches`, and where no file holds any document (empty corpus).
    """
    start, empty = 0, True
    for path in paths:
        file = RawFile(str(path), path.stat().st_size)
        for batch in read_batches(file, fields, origin):
            if isinstance(batch, TokenBatch):
                raise ValueError(f"{path}: holds token ids, and text is needed")
            empty = False
            nothing: list[str | None] = [None] * len(batch.lines)
            columns = zip(
                zip(*batch.texts, strict=True),
                batch.ids or nothing,
                batch.urls or nothing,
                batch.lines,
                strict=True,
            )
            for texts, id_, url, line in columns:
                yield Record(texts, id_, url, path, line, start + batch.position)
        start += file.size
    if empty:
        raise ValueError(f"empty corpus: no document in {', '.join(map(str, paths))}")
