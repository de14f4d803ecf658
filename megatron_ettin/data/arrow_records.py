"""Documents of tables: Parquet and Arrow files, read by columns."""

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_ettin.data.batches import (
    BATCH_BYTES,
    ReadRequest,
    TextBatch,
    cuts,
    known,
    no_field,
    numbers,
)
from megatron_ettin.data.storage import RawFile, is_url, named_errors

MAX_ROWS = 2**16
"""Rows of a Parquet file that are decoded at a time, at most."""
STREAM_BYTES = 2**20
"""Bytes of a Parquet column that are read at a time: a column of a row group can be gigabytes."""
FILE_MAGIC = b"ARROW1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class _Columns(NamedTuple):
    """Names of the wanted columns."""

    fields: tuple[str, ...]
    id: str | None
    url: str | None

    def all(self) -> list[str]:
        return list(dict.fromkeys([*self.fields, *filter(None, (self.id, self.url))]))


class _Place(NamedTuple):
    """Place of a record batch in its file."""

    row: int
    """Rows before it."""
    position: int
    """Bytes before it."""
    next_position: int

    def part(self, begin: int, end: int, num_rows: int) -> "_Place":
        """Return the place of rows [begin, end) of the batch."""
        size = self.next_position - self.position
        first, last = (self.position + size * row // num_rows for row in (begin, end))
        return _Place(self.row + begin, first, last)


def read_parquet(request: ReadRequest) -> Iterator[TextBatch]:
    """Yield the rows of a Parquet file; the wanted columns must be strings.

    The columns of the origin may be of any type that has a text form.
    """
    file = request.file
    done = 0
    try:
        with (
            named_errors(file.path),
            file.open_at_random() as source,
            # A local column is streamed. A store is slow to answer: whole row groups are asked for.
            pq.ParquetFile(source, buffer_size=STREAM_BYTES, pre_buffer=is_url(file.path)) as table,
        ):
            columns = _find_columns(request, table.schema_arrow)
            wanted, rows = columns.all(), table.metadata.num_rows
            size = _rows_at_a_time(table.metadata, wanted)
            for batch in table.iter_batches(batch_size=size, columns=wanted):
                after = done + batch.num_rows
                place = _Place(done, file.size * done // rows, file.size * after // rows)
                yield from _documents(request, columns, batch, place)
                done = after
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, "parquet", done, error) from error
    file.check_size()


def read_arrow(request: ReadRequest) -> Iterator[TextBatch]:
    """Yield the rows of an Arrow file, of either kind: with a footer, or a stream."""
    file = request.file
    done = 0
    columns: _Columns | None = None
    try:
        with named_errors(file.path), file.open_at_random() as source:
            for batch, place in _record_batches(file, source):
                columns = columns or _find_columns(request, batch.schema)
                for begin in range(0, batch.num_rows, MAX_ROWS):
                    piece = batch[begin : begin + MAX_ROWS]
                    inside = place.part(begin, begin + piece.num_rows, batch.num_rows)
                    yield from _documents(request, columns, piece, inside._replace(row=done))
                    done += piece.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, "arrow", done, error) from error
    file.check_size()


def _record_batches(file: RawFile, source: BinaryIO) -> Iterator[tuple[pa.RecordBatch, _Place]]:
    """Yield each record batch with its place, whose row is left open.

    A file without batches gives its schema as one without rows.
    """
    if source.read(len(FILE_MAGIC)) == FILE_MAGIC:
        source.seek(0)
        table = pa.ipc.open_file(source)
        count = table.num_record_batches
        for number in range(count):
            begin, end = (file.size * n // count for n in (number, number + 1))
            yield table.get_batch(number), _Place(0, begin, end)
        if not count:
            yield _empty(table.schema), _Place(0, 0, file.size)
        return
    source.seek(max(0, file.size - len(END_OF_STREAM)))
    if source.read(len(END_OF_STREAM)) != END_OF_STREAM:
        # Without this, a file that is cut between two batches would look whole.
        raise pa.ArrowInvalid("there is no end-of-stream mark, so the file is truncated")
    source.seek(0)
    stream = pa.ipc.open_stream(source)
    yield _empty(stream.schema), _Place(0, 0, 0)
    before = source.tell()
    for batch in stream:
        after = source.tell()
        if file.size - after <= len(END_OF_STREAM):
            after = file.size
        yield batch, _Place(0, before, after)
        before = after
    if file.size - source.tell() > len(END_OF_STREAM):
        raise pa.ArrowInvalid(f"the stream ends at byte {source.tell()}, and more bytes follow")


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=schema)


def _unreadable(file: RawFile, kind: str, done: int, error: Exception) -> Exception:
    """Return the error about a file that cannot be read, or that changed meanwhile."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return error
    file.check_size()
    return ValueError(
        f"{file.path}: cannot be read as {kind} after row {done} ({file.size} bytes): {error}"
    )


def _rows_at_a_time(metadata: Any, wanted: Sequence[str]) -> int:
    """Return about how many rows of the wanted columns BATCH_BYTES hold."""
    size = 0
    places = [n for n in range(metadata.num_columns) if metadata.schema.column(n).path in wanted]
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size += sum(group.column(place).total_uncompressed_size for place in places)
    return max(1, min(MAX_ROWS, metadata.num_rows * BATCH_BYTES // max(1, size)))


def _find_columns(request: ReadRequest, schema: pa.Schema) -> _Columns:
    path = request.file.path
    for field in request.fields:
        if field not in schema.names:
            raise ValueError(f"{path}: {no_field(field, schema.names)}")
        kind = schema.field(field).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f'{path}: field "{field}" is {kind}, not a string')
    try:
        names = request.origin_names(schema.names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return _Columns(request.fields, *names)


def _documents(
    request: ReadRequest, columns: _Columns, batch: pa.RecordBatch, place: _Place
) -> Iterator[TextBatch]:
    """Yield the rows of a record batch that are documents, in batches of BATCH_BYTES."""
    if not batch.num_rows:
        return
    texts = {field: _plain(batch.column(field)) for field in columns.fields}
    names = {name: _names(request, name, batch) for name in (columns.id, columns.url) if name}
    faults: dict[int, str] = {}
    for field, column in [*texts.items(), *names.items()]:
        for row, fault in _faults(field, column, nulls=field not in texts):
            faults.setdefault(row, fault)
    for row in sorted(faults):
        if row and request.on_bad is None:
            # The rows before the bad one, as of any other file.
            yield from _documents(request, columns, batch[:row], place.part(0, row, batch.num_rows))
        request.report(place.row + row + 1, faults[row])
    kept = np.delete(np.arange(batch.num_rows), list(faults))
    if faults:
        texts = {field: column.take(pa.array(kept)) for field, column in texts.items()}
        names = {name: column.take(pa.array(kept)) for name, column in names.items()}
    for begin, end in cuts(_sizes(list(texts.values()))):
        rows = kept[begin:end] + place.row + 1
        whole = int(rows[-1] - rows[0]) + 1 == len(rows)
        strings = {
            name: column[begin:end].to_numpy(zero_copy_only=False).tolist()
            for name, column in [*names.items(), *texts.items()]
        }
        yield TextBatch(
            tuple(strings[field] for field in columns.fields),
            known(strings[columns.id]) if columns.id else None,
            known(strings[columns.url]) if columns.url else None,
            range(int(rows[0]), int(rows[-1]) + 1) if whole else numbers(rows.tolist()),
            place.part(0, int(kept[end - 1]) + 1, batch.num_rows).next_position,
        )


def _plain(column: pa.Array) -> pa.Array:
    """Return strings that a dictionary may hold as plain ones, not checked."""
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _names(request: ReadRequest, field: str, batch: pa.RecordBatch) -> pa.Array:
    column = _plain(batch.column(field))
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column
    try:
        return column.cast(pa.string())
    except pa.ArrowNotImplementedError:
        raise ValueError(
            f'{request.file.path}: field "{field}" is {column.type}, which has no text to keep as'
            " the id or url of a document; name another with --id-key or --url-key"
        ) from None


def _faults(field: str, column: pa.Array, *, nulls: bool) -> Iterator[tuple[int, str]]:
    """Yield (row from 0, fault) of the values that are no text; null is one unless allowed."""
    if column.null_count and not nulls:
        for row in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist():
            yield row, f'field "{field}" is null, not a string'
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        for row, value in enumerate(column):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                yield row, f'field "{field}": invalid UTF-8 at byte {error.start + 1}'


def _sizes(columns: list[pa.Array]) -> NDArray[np.int64]:
    """Return the bytes of the texts of each row [n]."""
    sizes = [pc.binary_length(column).to_numpy(zero_copy_only=False) for column in columns]
    return np.sum(np.stack(sizes), axis=0, dtype=np.int64)
