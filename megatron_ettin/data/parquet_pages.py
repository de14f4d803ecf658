"""Single pages of a Parquet column: a value costs the decoding of its page, not of its row group.

Arrow reads whole row groups only. Here the pages that hold wanted rows are copied, with their
headers, to a file in memory in which each is a row group of its own. Arrow reads that file, so it
compares checksums, decompresses and decodes as it does with any other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_ettin import native

#: Bytes of pages, decompressed, that are decoded at a time.
BATCH_BYTES = 32 << 20
_MAGIC = b"PAR1"
# Numbers of the Parquet format (parquet.thrift).
_PHYSICAL_TYPES = {"INT64": 2, "BYTE_ARRAY": 6, "FIXED_LEN_BYTE_ARRAY": 7}
_REQUIRED, _OPTIONAL, _UTF8, _PLAIN, _RLE = 0, 1, 0, 0, 3
_CODECS = {"UNCOMPRESSED": 0, "SNAPPY": 1, "GZIP": 2, "ZSTD": 6}
# Numbers of Thrift's compact protocol, in which the footer is written.
_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12


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
    path: Path,
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
    with path.open("rb", buffering=0) as file:
        for group, of_group in wanted:
            pages = pages_of(path, metadata.row_group(group).column(place))
            begins = np.array([page.first_row for page in pages])
            holder = np.searchsorted(begins, of_group, side="right") - 1
            for number in np.unique(holder).tolist():
                page = pages[number]
                rows.append(of_group[holder == number] - page.first_row + num_rows)
                batch.append(page)
                num_rows += page.num_rows
                num_bytes += page.uncompressed_bytes
                if num_bytes >= BATCH_BYTES:
                    found += _decode(file, column, batch).take(np.concatenate(rows)).chunks
                    batch, rows, num_bytes, num_rows = [], [], 0, 0
        if batch:
            found += _decode(file, column, batch).take(np.concatenate(rows)).chunks
    return pa.chunked_array(found)


def pages_of(path: Path, chunk: pq.ColumnChunkMetaData) -> list[Page]:
    """Return the pages of a column chunk; ValueError if they are not those that its footer counts.

    No checksum covers a header. A number of rows in one that was altered moves all later rows, so
    their sum is compared.
    """
    begin, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    pages, first_row = [], 0
    for offset, of_header, of_page, uncompressed, num_rows in native.page_headers(
        path, begin, end
    ).tolist():
        pages.append(Page(offset, of_header + of_page, uncompressed, first_row, num_rows))
        first_row += num_rows
    if first_row != chunk.num_values:
        raise ValueError(f"byte {begin}: pages of {first_row} rows, not {chunk.num_values}")
    return pages


def _decode(file: FileIO, column: _Column, pages: Sequence[Page]) -> pa.ChunkedArray:
    """Return the values of all rows of some pages; ValueError names the one that is damaged."""
    content, places = bytearray(_MAGIC), []
    for page in pages:
        places.append(len(content))
        content += os.pread(file.fileno(), page.num_bytes, page.offset)
        if len(content) < places[-1] + page.num_bytes:
            raise ValueError(f"byte {page.offset}: the file ends within a page")
    footer = _footer(column, pages, places)
    content += footer + len(footer).to_bytes(4, "little") + _MAGIC
    try:
        parquet = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        return parquet.read(["value"])["value"]
    except (pa.ArrowException, OSError) as error:
        if len(pages) == 1:
            raise ValueError(f"byte {pages[0].offset}: {error}") from error
        for page in pages:
            _decode(file, column, [page])
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
