"""Documents of JSON lines: a compiled decoder for blocks of usual lines, the standard one else.

What a line means is defined by the standard library's `json`. The compiled decoder (msgspec) reads
a block only where it is bound to agree; every other block is read line by line.
"""

import json
import re
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec
import numpy as np

from megatron_ettin.data.batches import (
    BatchBuilder,
    ReadRequest,
    TextBatch,
    known,
    no_field,
)
from megatron_ettin.data.blocks import LineBlock, read_blocks
from megatron_ettin.data.lines import decode_line

# `int` refuses more than 4300 digits, and so does `json`. Such a number shows in every 256th byte.
DIGITS_STEP = 256
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (4300 // DIGITS_STEP - 1))


def read_json(request: ReadRequest) -> Iterator[TextBatch]:
    """Yield the documents of JSON objects, one per line; blank lines are skipped."""
    decoder = BlockDecoder.of(request)
    for block in read_blocks(request.file):
        columns = decoder.decode(block) if decoder else None
        if columns is None:
            yield from _read_lines(request, block)
            continue
        lines = range(block.first_line, block.first_line + block.num_lines)
        batch = [TextBatch(*columns, lines, block.position)]
        del block, columns  # a long text would be held twice
        yield batch.pop()


class Columns(NamedTuple):
    """Texts by field, ids and addresses of the documents of a block."""

    texts: tuple[list[str], ...]
    ids: list[str | None] | None
    urls: list[str | None] | None


class BlockDecoder:
    """Compiled decoder of the fields that a request names."""

    def __init__(
        self,
        decoder: "msgspec.json.Decoder[Any]",
        texts: Sequence[str],
        id_: str | None,
        url: str | None,
    ) -> None:
        """Take a decoder and the attributes that hold the columns; `of` makes it."""
        self._decoder = decoder
        self._texts = texts
        self._id = id_
        self._url = url

    @classmethod
    def of(cls, request: ReadRequest) -> "BlockDecoder | None":
        """Compile a decoder; None where a field has a name that msgspec cannot look for."""
        origin = request.origin
        id_, url = (origin.id or "id", origin.url or "url") if origin else (None, None)
        names = list(dict.fromkeys([*request.fields, *filter(None, (id_, url))]))
        attributes = {name: f"field_{place}" for place, name in enumerate(names)}
        needed = {*request.fields, *filter(None, origin or ())}
        # Fields with a default come last.
        names.sort(key=lambda name: name not in needed)
        fields: list[Any] = []
        for name in names:
            kind: Any = str if name in request.fields else Any
            default = () if name in needed else (None,)
            fields.append((attributes[name], kind, *default))
        try:
            record = msgspec.defstruct(
                "JsonDocument",
                fields,
                rename={attribute: name for name, attribute in attributes.items()},
                gc=False,
            )
        except ValueError:
            return None
        texts = [attributes[name] for name in request.fields]
        return cls(
            msgspec.json.Decoder(record),
            texts,
            attributes[id_] if id_ else None,
            attributes[url] if url else None,
        )

    def decode(self, block: LineBlock) -> Columns | None:
        """Return the columns of a block; None where the standard decoder may see other ones."""
        content = block.content
        if not _is_line_by_line(block):
            return None
        if _LONG_NUMBER.search(content[::DIGITS_STEP]) or not block.is_utf8():
            return None
        try:
            records = self._decoder.decode_lines(content)
        except (msgspec.MsgspecError, RecursionError, ValueError):
            return None
        if len(records) != block.num_lines:
            return None
        return Columns(
            tuple(list(map(attrgetter(name), records)) for name in self._texts),
            _names(records, self._id),
            _names(records, self._url),
        )


def _names(records: list[Any], attribute: str | None) -> list[str | None] | None:
    if attribute is None:
        return None
    values = list(map(attrgetter(attribute), records))
    if set(map(type, values)) <= {str, type(None)}:
        return known(values)
    return [str(value) if type(value) is int else _name(value) for value in values]


def _is_line_by_line(block: LineBlock) -> bool:
    """Say whether each LF stands between } and {, and these at both ends.

    Then none is inside a record, where a comma would be missing. So each line holds one record or
    more, and exactly one if there are as many records as lines.
    """
    content, ends = np.frombuffer(block.content, np.uint8), block.ends
    if content[0] != ord("{") or content[-1] not in (ord("}"), ord("\n")):
        return False
    inner = ends[: block.num_lines - 1]
    return bool((content[ends - 1] == ord("}")).all() and (content[inner + 1] == ord("{")).all())


def _read_lines(request: ReadRequest, block: LineBlock) -> Iterator[TextBatch]:
    """Yield the documents of a block, read line by line; before an error, those before it."""
    builder = BatchBuilder(len(request.fields))
    try:
        for number, line in block.lines():
            try:
                found = _read_line(request, number, line)
            except ValueError as error:
                request.report(number, str(error), line.rstrip(b"\r\n"))
                continue
            if found is not None:
                builder.add(*found, number)
    except ValueError:
        yield from builder.take(block.position)
        raise
    yield from builder.take(block.position)


def _read_line(
    request: ReadRequest, number: int, content: bytes
) -> tuple[list[str], str | None, str | None] | None:
    """Return texts, id and address of a line, None if it is blank.

    ValueError, without the place of the line, where it is bad.
    """
    line = decode_line(number, content)
    if not line.strip():
        return None
    record = _parse(line)
    texts = [_text(record, field) for field in request.fields]
    names = request.origin_names(record)
    id_, url = (_name(record[name]) if name else None for name in names)
    if "\\u" in line:
        _check_surrogates([*request.fields, *names], [*texts, id_, url])
    return texts, id_, url


def _parse(line: str) -> dict[str, object]:
    try:
        record = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"invalid JSON at column {error.colno}: {error.msg}; every line must be one whole JSON"
            " object"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"JSON that cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, found {_kind(record)}")
    return record


def _text(record: dict[str, object], field: str) -> str:
    if field not in record:
        raise ValueError(no_field(field, list(record)))
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f'field "{field}" is {_kind(text)}, not a string')
    return text


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "an array" if isinstance(value, list) else "an object")


def _name(value: object) -> str | None:
    """Return a string as it is, null as None, and any other value (a number) as its JSON text."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _check_surrogates(fields: Sequence[str | None], texts: Sequence[str | None]) -> None:
    """Refuse half a surrogate pair (\\ud83d alone): legal in JSON, but not text in any encoding."""
    for field, text in zip(fields, texts, strict=True):
        try:
            (text or "").encode("utf-8")
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            raise ValueError(
                f'field "{field}" holds half a surrogate pair (\\u{half:04x}) at character'
                f" {error.start + 1}; no such character exists"
            ) from None
