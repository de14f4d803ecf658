"""Items of a benchmark: the fields of a JSON Lines file that a model is asked or graded with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.data.json_lines import JsonLine, read_json_lines

#: Characters of a field that a message quotes.
QUOTED = 40


@dataclass(frozen=True, kw_only=True)
class BenchmarkItem:
    """One line of the file."""

    line: int
    """Number of the line, from 1."""
    id: str | None
    """Field "id" of the line, if it is a string or a number."""
    passages: list[str]
    """Texts of the fields; a list of strings gives one each. No sequence of words spans two."""


def read_items(path: Path, fields: Sequence[str]) -> list[BenchmarkItem]:
    """Return the items of a JSON Lines file; blank lines are none.

    Raises:
        ValueError: a line is no JSON object, lacks a field, or has one that is neither a string nor
            a list of strings, or is half a character; the message names file and line. Or there is
            no item.
        OSError: the file cannot be read.
    """
    items = [
        BenchmarkItem(
            line=int(line.where.rpartition(":")[2]),
            id=_id_of(line),
            passages=[
                _whole(line, field, text) for field in fields for text in _texts(line, field)
            ],
        )
        for line in read_json_lines(path)
    ]
    if not items:
        raise ValueError(f"{path}: has no items: one JSON object a line is needed")
    return items


def _id_of(line: JsonLine) -> str | None:
    id_ = line.fields.get("id")
    return str(id_) if isinstance(id_, str | int) and not isinstance(id_, bool) else None


def _texts(line: JsonLine, field: str) -> list[str]:
    value = line.fields.get(field)
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return value
    if value is not None and not isinstance(value, str):
        raise ValueError(
            f'{line.where}: field "{field}" is {value!r:.{QUOTED}}, neither a string nor a list of '
            f"strings"
        )
    return [line.text(field)]


def _whole(line: JsonLine, field: str, text: str) -> str:
    """Return a text; ValueError if it has half of a surrogate pair, which JSON can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f'{line.where}: field "{field}": character {error.start} is half of a surrogate pair'
        ) from None
    return text
