"""Single pages of a Parquet column: a value costs the decoding of its page, not of its row group.

Arrow reads whole row groups only. Here the pages that hold wanted rows are copied, with their
headers, to a file in memory in which each is a row group of its own. Arrow reads that file, so it
compares checksums, decompresses and decodes as it does with any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

#: Bytes of pages, decompressed, that are decoded at a time.
BATCH_BYTES = 32 << 20
#: Bytes that a page's header is expected to fit into; a longer one is read again.
_HEADER_BYTES = 512
_MAGIC = b"PAR1"
# Numbers of the Parquet format (parquet.thrift). A header names the kind of its page in field 1,
# and describes a data page of either version in another field.
_DESCRIBED = {0: 5, 3: 8}
_PHYSICAL_TYPES = {"INT64": 2, "BYTE_ARRAY": 6, "FIXED_LEN_BYTE_ARRAY": 7}
_REQUIRED, _OPTIONAL, _UTF8, _PLAIN, _RLE = 0, 1, 0, 0, 3
_CODECS = {"UNCOMPRESSED": 0, "SNAPPY": 1, "GZIP": 2, "ZSTD": 6}
# Numbers of Thrift's compact protocol, in which headers and footer are written.
_TRUE, _FALSE, _BYTE, _I32, _I64, _BINARY, _LIST, _STRUCT = 1, 2, 3, 5, 6, 8, 9, 12
_WITH_NUMBER = (_I32, _I64, _BINARY)


# A value to be written: its type, and its bytes.
_Value = tuple[int, bytes]


class Page(NamedTuple):
    """A data page of a column chunk, and its header before it."""

    offset: int
    """First byte of the header in the file."""
    num_bytes: int
    """Bytes of header and compressed content."""
    uncompressed_bytes: int
    first_row: int
    """Number of its first row in the row group."""
    num_rows: int


class _Column(NamedTuple):
    """Column of which a file of single pages consists."""

    physical_type: int
    element: _Value
    """Its element of the file's schema."""
    codec: int


def has_single_pages(chunk: pq.ColumnChunkMetaData) -> bool:
    """Tell whether `read_values` can read pages of a column chunk."""
    return (
        chunk.physical_type in _PHYSICAL_TYPES
        and chunk.compression in _CODECS
        and not chunk.has_dictionary_page
    )


def read_values(
    source: pa.NativeFile,
    metadata: pq.FileMetaData,
    place: int,
    wanted: Sequence[tuple[int, NDArray[np.int64]]],
) -> pa.ChunkedArray:
    """Return the values of rows of row groups, (group, ascending rows [n] in it), end to end.

    One row at least. The column at this place of the schema has strings, int64, or binary values of
    one length, and all its chunks have one codec.

    Raises:
        ValueError: the file is damaged; the message names the byte.
        OSError: the file cannot be read.
    """
    column = _describe(metadata, wanted[0][0], place)
    found: list[pa.Array] = []
    batch: list[Page] = []
    rows: list[NDArray[np.int64]] = []
    num_bytes = num_rows = 0
    for group, of_group in wanted:
        pages = list(pages_of(source, metadata.row_group(group).column(place)))
        begins = np.array([page.first_row for page in pages])
        holder = np.searchsorted(begins, of_group, side="right") - 1
        for number in np.unique(holder).tolist():
            page = pages[number]
            rows.append(of_group[holder == number] - page.first_row + num_rows)
            batch.append(page)
            num_rows += page.num_rows
            num_bytes += page.uncompressed_bytes
            if num_bytes >= BATCH_BYTES:
                found += _decode(source, column, batch).take(np.concatenate(rows)).chunks
                batch, rows, num_bytes, num_rows = [], [], 0, 0
    if batch:
        found += _decode(source, column, batch).take(np.concatenate(rows)).chunks
    return pa.chunked_array(found)


def pages_of(source: pa.NativeFile, chunk: pq.ColumnChunkMetaData) -> Iterator[Page]:
    """Yield the pages of a column chunk; ValueError if they are not those that its footer counts.

    No checksum covers a header. A number of rows in one that was altered moves all later rows, so
    their sum is compared.
    """
    offset, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    first_row = 0
    while offset < end:
        header, length = _read_header(source, offset, end)
        uncompressed, compressed = _number(header, 2), _number(header, 3)
        num_rows = _number(header, _DESCRIBED.get(_number(header, 1), 0), 1)
        if min(uncompressed, compressed, num_rows) < 0 or offset + length + compressed > end:
            raise ValueError(f"byte {offset}: no header of a data page")
        yield Page(offset, length + compressed, uncompressed, first_row, num_rows)
        offset += length + compressed
        first_row += num_rows
    if first_row != chunk.num_values:
        raise ValueError(
            f"byte {chunk.data_page_offset}: pages of {first_row} rows, not {chunk.num_values}"
        )


def _number(fields: Any, *path: int) -> int:
    """Return the integer at a path of field numbers; -1 if there is none."""
    for number in path:
        fields = fields.get(number) if isinstance(fields, dict) else None
    return fields if type(fields) is int else -1


def _read_header(source: pa.NativeFile, offset: int, end: int) -> tuple[dict[int, Any], int]:
    """Return the fields of the header at a byte of the file, and its length."""
    size = _HEADER_BYTES
    while True:
        content = source.read_at(min(size, end - offset), offset)
        try:
            return _parse_struct(content, 0)
        except IndexError:
            if size >= end - offset or len(content) < size:
                raise ValueError(f"byte {offset}: a header without end") from None
            size *= 8
        except ValueError as error:
            raise ValueError(f"byte {offset}: no header of a page: {error}") from None


def _decode(source: pa.NativeFile, column: _Column, pages: Sequence[Page]) -> pa.ChunkedArray:
    """Return the values of all rows of some pages; ValueError names the one that is damaged."""
    content, places = bytearray(_MAGIC), []
    for page in pages:
        places.append(len(content))
        content += source.read_at(page.num_bytes, page.offset)
        if len(content) < places[-1] + page.num_bytes:
            raise ValueError(f"byte {page.offset}: the file ends within a page")
    footer = _footer(column, pages, places)
    content += footer + len(footer).to_bytes(4, "little") + _MAGIC
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        return file.read(["value"])["value"]
    except (pa.ArrowException, OSError) as error:
        if len(pages) == 1:
            raise ValueError(f"byte {pages[0].offset}: {error}") from error
        for page in pages:
            _decode(source, column, [page])
        raise


def _describe(metadata: pq.FileMetaData, group: int, place: int) -> _Column:
    schema, chunk = metadata.schema.column(place), metadata.row_group(group).column(place)
    physical_type = _PHYSICAL_TYPES[chunk.physical_type]
    is_optional = schema.max_definition_level > 0
    element = {
        1: _integer(physical_type),
        **({2: _integer(schema.length)} if schema.length else {}),
        3: _integer(_OPTIONAL if is_optional else _REQUIRED),
        4: _text("value"),
        **({6: _integer(_UTF8)} if schema.converted_type == "UTF8" else {}),
    }
    return _Column(physical_type, _struct(element), _CODECS[chunk.compression])


def _footer(column: _Column, pages: Sequence[Page], places: Sequence[int]) -> bytes:
    """Return the footer of a file of one column that has these pages at these places."""
    root = _struct({4: _text("schema"), 5: _integer(1)})
    groups = []
    for page, place in zip(pages, places, strict=True):
        described = {
            1: _integer(column.physical_type),
            2: _items(_I32, [_integer(_PLAIN), _integer(_RLE)]),
            3: _items(_BINARY, [_text("value")]),
            4: _integer(column.codec),
            5: _integer(page.num_rows, _I64),
            6: _integer(page.uncompressed_bytes, _I64),
            7: _integer(page.num_bytes, _I64),
            9: _integer(place, _I64),
        }
        chunk = _struct({2: _integer(place, _I64), 3: _struct(described)})
        size = _integer(page.uncompressed_bytes, _I64)
        group = {1: _items(_STRUCT, [chunk]), 2: size, 3: _integer(page.num_rows, _I64)}
        groups.append(_struct(group))
    _, footer = _struct(
        {
            1: _integer(1),
            2: _items(_STRUCT, [root, column.element]),
            3: _integer(sum(page.num_rows for page in pages), _I64),
            4: _items(_STRUCT, groups),
        }
    )
    return footer


def _varint(number: int) -> bytes:
    content = bytearray()
    while number > 0x7F:
        content.append(number & 0x7F | 0x80)
        number >>= 7
    content.append(number)
    return bytes(content)


def _integer(number: int, kind: int = _I32) -> _Value:
    return kind, _varint(2 * number)  # zigzag; none is negative


def _text(text: str) -> _Value:
    return _BINARY, _varint(len(text)) + text.encode()


def _items(kind: int, items: Sequence[_Value]) -> _Value:
    head = bytes([len(items) << 4 | kind]) if len(items) < 15 else bytes([0xF0 | kind])
    count = b"" if len(items) < 15 else _varint(len(items))
    return _LIST, head + count + b"".join(content for _, content in items)


def _struct(fields: dict[int, _Value]) -> _Value:
    content, last = bytearray(), 0
    for number, (kind, value) in fields.items():
        content.append((number - last) << 4 | kind)
        content += value
        last = number
    return _STRUCT, bytes(content) + b"\x00"


def _parse_struct(content: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Return the fields of a struct, and where it ends; IndexError if `content` ends before.

    A look-up parses some fifty headers, which take most of its time, so numbers of one byte are
    read here.
    """
    fields: dict[int, Any] = {}
    number = 0
    while head := content[at]:
        at += 1
        kind = head & 0x0F
        if head > 0x0F:
            number += head >> 4
        else:
            value, at = _parse_varint(content, at)
            number = value >> 1 ^ -(value & 1)
        if kind in _WITH_NUMBER:
            value = content[at]
            at += 1
            if value > 0x7F:
                value, at = _parse_varint(content, at - 1)
            if kind == _BINARY:
                at += value
                content[at - 1]  # IndexError if it is not there
            else:
                fields[number] = value >> 1 ^ -(value & 1)
        elif kind == _STRUCT:
            fields[number], at = _parse_struct(content, at)
        elif kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        elif kind == _BYTE:
            fields[number], at = content[at], at + 1
        else:
            raise ValueError(f"a field of type {kind}")
    return fields, at + 1


def _parse_varint(content: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while (byte := content[at]) & 0x80:
        number |= (byte & 0x7F) << shift
        shift += 7
        at += 1
    return number | byte << shift, at + 1
