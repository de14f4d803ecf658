"""Batches of raw documents, by column, and the request that a reader answers with them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.data.storage import RawFile

BATCH_BYTES = 2**22
"""Text of a batch, about; a document that is larger is a batch alone."""
LARGE_CHARACTERS = 2**24
"""Text of a document, or ids, above which no other batch is in memory beside it."""


class OriginFields(NamedTuple):
    """Names of the fields that say where a record came from."""

    id: str | None = None
    """Field of the id; None: `id`, where there is one. A field that is named must be everywhere."""
    url: str | None = None
    """Field of the address; None: `url`, likewise."""


class TextBatch(NamedTuple):
    """Documents of one raw file, in order, by column; at least one."""

    texts: tuple[list[str], ...]
    """Texts of each field that was asked for, in that order."""
    ids: list[str | None] | None
    """Id of each document; None where no document of the batch has one, or none was asked for."""
    urls: list[str | None] | None
    lines: Sequence[int]
    """First line of each document, or its row where the format has no lines; from 1. A range where
    no number is left out."""
    position: int
    """Bytes of the raw file read so far; of a compressed file, compressed bytes."""


class TokenBatch(NamedTuple):
    """Documents of one raw file that are token ids already, in order; at least one."""

    tokens: NDArray[np.int32]
    """Ids of all documents, end to end."""
    lengths: NDArray[np.int64]
    """Tokens of each document; may be 0."""
    ids: list[str | None] | None
    urls: list[str | None] | None
    lines: Sequence[int]
    position: int


def is_large(batch: TextBatch | TokenBatch) -> bool:
    """Say whether a batch is one document of more than LARGE_CHARACTERS."""
    if isinstance(batch, TokenBatch):
        return len(batch.tokens) > LARGE_CHARACTERS
    return len(batch.lines) == 1 and sum(len(t[0]) for t in batch.texts) > LARGE_CHARACTERS


class BadRecord(NamedTuple):
    """Record that is not a document."""

    path: str
    line: int
    """First line of the record, or its row; from 1."""
    reason: str
    """Message without the path and the line."""
    content: bytes
    """Raw bytes of the record without its line end; empty where they are not known."""


@dataclass(frozen=True, kw_only=True)
class ReadRequest:
    """Wish for some fields of a raw file."""

    file: RawFile
    fields: tuple[str, ...]
    origin: OriginFields | None = None
    """Ids and addresses are asked for unless it is None."""
    on_bad: Callable[[BadRecord], None] | None = None
    """Gets each bad record; None: the first one raises ValueError."""
    unit: str = ":"
    """Text between the path and the number of a record in messages."""

    def report(self, line: int, reason: str, content: bytes = b"") -> None:
        """Hand a bad record over; ValueError naming file and line if nobody asked for them."""
        if self.on_bad is None:
            raise ValueError(f"{self.file.path}{self.unit}{line}: {reason}")
        self.on_bad(BadRecord(self.file.path, line, reason, content))

    def origin_names(self, present: Collection[str]) -> tuple[str | None, str | None]:
        """Return the fields with the id and the url of a record that has the fields `present`.

        ValueError, without the place, where one that was named is not there.
        """
        if self.origin is None:
            return None, None
        if self.origin.id is not None and self.origin.id not in present:
            raise ValueError(no_field(self.origin.id, list(present), "id", "--id-key"))
        if self.origin.url is not None and self.origin.url not in present:
            raise ValueError(no_field(self.origin.url, list(present), "url", "--url-key"))
        id_, url = self.origin.id or "id", self.origin.url or "url"
        return id_ if id_ in present else None, url if url in present else None


class BatchBuilder:
    """Documents that become one batch."""

    def __init__(self, num_fields: int) -> None:
        """Start without documents."""
        self._num_fields = num_fields
        self._clear()

    def _clear(self) -> None:
        self._texts: tuple[list[str], ...] = tuple([] for _ in range(self._num_fields))
        self._ids: list[str | None] = []
        self._urls: list[str | None] = []
        self._lines: list[int] = []
        self._characters = 0

    def has_room(self, texts: Sequence[str]) -> bool:
        """Say whether a document fits in beside the others."""
        return not self._lines or self._characters + sum(map(len, texts)) <= BATCH_BYTES

    def add(self, texts: Sequence[str], id_: str | None, url: str | None, line: int) -> None:
        """Append a document."""
        for column, text in zip(self._texts, texts, strict=True):
            column.append(text)
            self._characters += len(text)
        self._ids.append(id_)
        self._urls.append(url)
        self._lines.append(line)

    def take(self, position: int) -> list[TextBatch]:
        """Return the documents as a batch, or nothing if there are none; begin the next one."""
        if not self._lines:
            return []
        batch = TextBatch(
            self._texts,
            known(self._ids),
            known(self._urls),
            numbers(self._lines),
            position,
        )
        self._clear()
        return [batch]


def known(names: list[str | None]) -> list[str | None] | None:
    """Return the list, or None if nothing in it is known."""
    return None if names.count(None) == len(names) else names


def numbers(lines: list[int]) -> Sequence[int]:
    """Return ascending numbers as a range if none is left out."""
    whole = range(lines[0], lines[-1] + 1)
    return whole if len(whole) == len(lines) else lines


def cuts(sizes: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return [begin, end) of runs of documents of at most BATCH_BYTES, or of one larger one."""
    ends = np.cumsum(sizes)
    runs, begin, before = [], 0, 0
    while begin < len(sizes):
        end = int(np.searchsorted(ends, before + BATCH_BYTES, side="right"))
        end = max(end, begin + 1)
        runs.append((begin, end))
        begin, before = end, int(ends[end - 1])
    return runs


def no_field(
    field: str, present: Sequence[str], what: str = "text", option: str = "--json-keys"
) -> str:
    """Return the message about a field that is not among those that are there."""
    names = ", ".join(f'"{name}"' for name in present[:20]) or "no fields at all"
    return f'no field "{field}"; there are {names}. Name the {what} field with {option}'
