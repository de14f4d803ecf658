"""Documents of CSV rows and of plain lines."""

import csv
import io
from collections.abc import Iterator
from typing import NamedTuple

from megatron_ettin.data.batches import BatchBuilder, ReadRequest, TextBatch, no_field
from megatron_ettin.data.blocks import Block, read_blocks
from megatron_ettin.data.lines import decode_line

# An unclosed quote makes the rest of a CSV file one field: stop before it fills the memory.
MAX_CSV_FIELD_CHARACTERS = 2**28


def read_csv(request: ReadRequest) -> Iterator[TextBatch]:
    """Yield the rows of a comma-separated file with a header (RFC 4180 quoting).

    A row with quoted newlines is located by its first line; an empty id or url is none.
    """
    source = _CsvLines(request)
    rows = _csv_rows(request, source)
    header = next(rows, None)
    if header is None:
        return
    table = _place_columns(request, header)
    builder = BatchBuilder(len(request.fields))
    try:
        for number, row in rows:
            fault = source.fault or _wrong_width(row, table.width)
            if fault:
                request.report(number, fault, source.record())
                continue
            texts = [row[column] for column in table.texts]
            id_, url = (None if place is None else row[place] or None for place in table.names)
            if not builder.has_room(texts):
                yield from builder.take(source.position)
            builder.add(texts, id_, url, number)
    except ValueError:
        yield from builder.take(source.position)
        raise
    yield from builder.take(source.position)


def read_txt(request: ReadRequest) -> Iterator[TextBatch]:
    """Yield each line that is not blank as the value of the one field, without id and url."""
    path = request.file.path
    if len(request.fields) != 1:
        raise ValueError(
            f"{path}: plain text has one field, not {len(request.fields)} ({list(request.fields)})"
        )
    try:
        request.origin_names(())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for block in read_blocks(request.file):
        builder = BatchBuilder(1)
        try:
            for number, line in _text_lines(request, block):
                if line.strip():
                    builder.add([line.rstrip("\r\n")], None, None, number)
        except ValueError:
            yield from builder.take(block.position)
            raise
        yield from builder.take(block.position)


def _text_lines(request: ReadRequest, block: Block) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of a block; lines that are not UTF-8 are reported."""
    for number, line in block.lines():
        try:
            text = decode_line(number, line)
        except ValueError as error:
            request.report(number, str(error), line.rstrip(b"\r\n"))
            continue
        yield number, text


class _CsvLines:
    """Lines of a file for `csv.reader`, with those of the row that it reads at the moment."""

    def __init__(self, request: ReadRequest) -> None:
        self._request = request
        self._row: list[str] = []
        self.position = 0
        """Bytes of the file read so far."""
        self.fault = ""
        """Fault of the encoding in the row, or nothing."""

    def __iter__(self) -> Iterator[str]:
        for block in read_blocks(self._request.file):
            self.position = block.position
            for line in self._decoded(block):
                self._row.append(line)
                yield line

    def begin_row(self) -> None:
        """Forget the lines of the last row."""
        self._row.clear()
        self.fault = ""

    def record(self) -> bytes:
        """Return the bytes of the row."""
        return "".join(self._row).encode(errors="surrogateescape").rstrip(b"\r\n")

    def _decoded(self, block: Block) -> Iterator[str]:
        try:
            text = block.content.decode()
        except UnicodeDecodeError:
            yield from self._decoded_by_line(block)
            return
        if block.first_line == 1:
            text = text.removeprefix("\ufeff")
        yield from io.StringIO(text, newline="\n")

    def _decoded_by_line(self, block: Block) -> Iterator[str]:
        for number, line in block.lines():
            try:
                yield decode_line(number, line)
            except ValueError as error:
                if self._request.on_bad is None:
                    self._request.report(number, str(error))
                self.fault = self.fault or str(error)
                # The row must be read to its end, so that the next one is found.
                yield line.decode(errors="surrogateescape")


def _csv_rows(request: ReadRequest, lines: _CsvLines) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, columns) for the header and every row; no blank lines."""
    csv.field_size_limit(MAX_CSV_FIELD_CHARACTERS)
    rows = csv.reader(lines, strict=True)
    first = 1
    try:
        for row in rows:
            if row:
                yield first, row
            first = rows.line_num + 1
            lines.begin_row()
    except csv.Error as error:
        raise ValueError(
            f"{request.file.path}:{first}: invalid CSV in the record that begins on this line,"
            f" noticed on line {rows.line_num}: {error}; a quote inside a quoted text must be"
            " doubled"
        ) from None


class _CsvColumns(NamedTuple):
    """Places of the wanted columns, and how many columns there are."""

    texts: list[int]
    names: list[int | None]
    width: int


def _place_columns(request: ReadRequest, header: tuple[int, list[str]]) -> _CsvColumns:
    number, names = header
    where = f"{request.file.path}:{number}"
    for field in request.fields:
        if field not in names:
            raise ValueError(f"{where}: {no_field(field, names)}")
    try:
        origin = request.origin_names(names)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return _CsvColumns(
        [names.index(field) for field in request.fields],
        [names.index(name) if name else None for name in origin],
        len(names),
    )


def _wrong_width(row: list[str], width: int) -> str:
    if len(row) == width:
        return ""
    return (
        f"{len(row)} columns where the header has {width}; a text with commas, quotes or newlines"
        " must be in quotes"
    )
