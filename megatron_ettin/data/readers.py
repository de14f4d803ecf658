"""Raw documents by file format: one streaming generator per suffix, in constant memory.

Every error names the file and the line or row, because a corpus has millions of them. A new format
is one function and one line in `READERS`.
"""

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import zstandard

if TYPE_CHECKING:
    import pyarrow

# An unclosed quote makes the rest of a CSV file one field: stop before it fills the memory.
MAX_CSV_FIELD_CHARACTERS = 2**28
PARQUET_BATCH_ROWS = 256
ZSTD_CHUNK_BYTES = 2**16
# `zstd --ultra --long=31` is the largest window that the command-line tool writes.
ZSTD_MAX_WINDOW_BYTES = 2**31


class Record(NamedTuple):
    """One raw document: its wanted fields, where it stands, and how far the reader has come."""

    texts: tuple[str, ...]
    """The text of each wanted field, in the order asked for."""
    location: str
    """`FILE:LINE`, or `FILE: row ROW` where the format has no lines (both count from 1)."""
    position: int
    """Bytes read from disk up to here (of compressed data where a file is compressed)."""


def expand_inputs(patterns: Sequence[str]) -> tuple[Path, ...]:
    """Return the files that the patterns name: in the order given, each glob sorted.

    FileNotFoundError where a file is missing or a glob matches nothing; ValueError for a folder, a
    suffix that no reader knows, or a file named twice (its documents would count twice).
    """
    paths: list[Path] = []
    for pattern in patterns:
        if Path(pattern).exists() or not glob.has_magic(pattern):
            found = [Path(pattern)]
        else:
            found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
            if not found:
                raise FileNotFoundError(f"no file matches {pattern!r}")
        for path in found:
            _check_input(path)
            if path in paths:
                raise ValueError(f"{path}: given twice; its documents would be counted twice")
            paths.append(path)
    return tuple(paths)


def read_files(paths: Sequence[Path], fields: Sequence[str]) -> Iterator[Record]:
    """Yield the records of all files in order; `position` counts bytes over all files.

    ValueError as the readers raise it, and where no file holds any document (empty corpus).
    """
    start, empty = 0, True
    for path in paths:
        for record in READERS[file_format(path)](path, fields):
            empty = False
            yield record._replace(position=start + record.position)
        start += path.stat().st_size
    if empty:
        raise ValueError(f"empty corpus: no document in {', '.join(map(str, paths))}")


def read_jsonl(path: Path, fields: Sequence[str]) -> Iterator[Record]:
    """Yield one record per line of JSON objects; blank lines are skipped. Also .gz and .zst."""
    with path.open("rb") as file:
        for number, line in _lines(path, file):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            record = _parse_json(where, line)
            texts = tuple(_json_text(where, record, field) for field in fields)
            if "\\u" in line:
                _check_surrogates(where, fields, texts)
            yield Record(texts, where, file.tell())


def read_csv(path: Path, fields: Sequence[str]) -> Iterator[Record]:
    """Yield one record per row of a comma-separated file with a header (RFC 4180 quoting).

    A row with quoted newlines is located by its first line.
    """
    with path.open("rb") as file:
        rows = _csv_rows(path, file)
        number, header = next(rows, (1, list(fields)))
        columns = [_index_of(f"{path}:{number}", header, field) for field in fields]
        for number, row in rows:
            where = f"{path}:{number}"
            if len(row) != len(header):
                raise ValueError(
                    f"{where}: {len(row)} columns where the header has {len(header)}; a text with"
                    " commas, quotes or newlines must be in quotes"
                )
            yield Record(tuple(row[column] for column in columns), where, file.tell())


def read_parquet(path: Path, fields: Sequence[str]) -> Iterator[Record]:
    """Yield one record per row of a parquet file; the wanted columns must be strings."""
    # Imported here: only this format needs it, and it costs 0.3 s.
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    done = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _check_columns(path, table.schema_arrow, fields)
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=list(fields)):
                columns = [
                    _parquet_texts(path, done, field, batch.column(field)) for field in fields
                ]
                for row, texts in enumerate(zip(*columns, strict=True), done + 1):
                    position = size * row // table.metadata.num_rows
                    yield Record(texts, f"{path}: row {row}", position)
                done += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet after row {done}: {error}") from error


def read_txt(path: Path, fields: Sequence[str]) -> Iterator[Record]:
    """Yield one record per line that is not blank; the line is the value of the one field."""
    if len(fields) != 1:
        raise ValueError(f"{path}: plain text has one field, not {len(fields)} ({list(fields)})")
    with path.open("rb") as file:
        for number, line in _lines(path, file):
            if line.strip():
                yield Record((line.rstrip("\r\n"),), f"{path}:{number}", file.tell())


READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Record]]] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".txt": read_txt,
}


def file_format(path: Path) -> str:
    """Return the suffix under which `READERS` knows the file; ValueError where there is none."""
    for suffix in READERS:
        if path.name.lower().endswith(suffix):
            return suffix
    raise ValueError(
        f"{path}: no reader for this suffix; known are {', '.join(READERS)} (a file with one JSON"
        " object per line must be named .jsonl)"
    )


def _check_input(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name its files or a glob such as '{path}/*.jsonl'")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    file_format(path)


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield (line number, line with its line end); lines end at LF only, a leading BOM is cut."""
    number = 0
    try:
        for number, line in enumerate(_decompressed(path, file), 1):
            yield number, _decode(path, number, line)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise ValueError(
            f"{path}: compressed data truncated or damaged after line {number} (byte {file.tell()}"
            f" of {path.stat().st_size}): {error}; copy or download it again"
        ) from error


def _decompressed(path: Path, file: BinaryIO) -> Iterable[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(file))
    return file


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of one or more zstd frames; EOFError where the last one is not whole.

    zstandard's own stream reader takes a truncated file for a shorter one without a word.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW_BYTES)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        while not self._ready:
            self._compressed = self._compressed or self._file.read(ZSTD_CHUNK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is not complete")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _decode(path: Path, number: int, line: bytes) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{number}: invalid UTF-8 at byte {error.start + 1} of the line"
            f" (0x{line[error.start]:02x}: {error.reason}); convert the file to UTF-8"
        ) from None
    return text.removeprefix("\ufeff") if number == 1 else text


def _parse_json(where: str, line: str) -> dict[str, object]:
    try:
        record = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: invalid JSON at column {error.colno}: {error.msg}; every line must be one"
            " whole JSON object"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: JSON that cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON object is needed, found {_json_name(record)}")
    return record


def _json_text(where: str, record: dict[str, object], field: str) -> str:
    if field not in record:
        raise ValueError(f"{where}: {_no_field(field, list(record))}")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f'{where}: field "{field}" is {_json_name(text)}, not a string')
    return text


def _json_name(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "an array" if isinstance(value, list) else "an object")


def _check_surrogates(where: str, fields: Sequence[str], texts: tuple[str, ...]) -> None:
    """Refuse half a surrogate pair (\\ud83d alone): legal in JSON, but not text in any encoding."""
    for field, text in zip(fields, texts, strict=True):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f'{where}: field "{field}" holds half a surrogate pair'
                f" (\\u{ord(text[error.start]):04x}) at character {error.start + 1}; no such"
                " character exists"
            ) from None


def _csv_rows(path: Path, file: BinaryIO) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, columns) for the header and every row; no blank lines."""
    csv.field_size_limit(MAX_CSV_FIELD_CHARACTERS)
    rows = csv.reader((line for _, line in _lines(path, file)), strict=True)
    first = 1
    try:
        for row in rows:
            if row:
                yield first, row
            first = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}:{first}: invalid CSV in the record that begins on this line, noticed on line"
            f" {rows.line_num}: {error}; a quote inside a quoted text must be doubled"
        ) from None


def _index_of(where: str, header: list[str], field: str) -> int:
    if field not in header:
        raise ValueError(f"{where}: {_no_field(field, header)}")
    return header.index(field)


def _check_columns(path: Path, schema: "pyarrow.Schema", fields: Sequence[str]) -> None:
    from pyarrow import types

    for field in fields:
        if field not in schema.names:
            raise ValueError(f"{path}: {_no_field(field, schema.names)}")
        kind = schema.field(field).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise ValueError(f'{path}: field "{field}" is {kind}, not a string')


def _parquet_texts(path: Path, start: int, field: str, column: "pyarrow.Array") -> list[str]:
    texts = []
    for row, value in enumerate(column, start + 1):
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            raise ValueError(
                f'{path}: row {row}: field "{field}": invalid UTF-8 at byte {error.start + 1}'
            ) from None
        if text is None:
            raise ValueError(f'{path}: row {row}: field "{field}" is null, not a string')
        texts.append(text)
    return texts


def _no_field(field: str, present: Sequence[str]) -> str:
    names = ", ".join(f'"{name}"' for name in present[:20]) or "no fields at all"
    return f'no field "{field}"; there are {names}. Name the text field with --json-keys'
