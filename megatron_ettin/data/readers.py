"""Readers of raw documents: one streaming generator per file format, in constant memory.

Every error names the file and the line or row, because a corpus has millions of them. A new format
is one function and one line in `READERS`.
"""

import csv
import glob
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from megatron_ettin.data.lines import read_lines

if TYPE_CHECKING:
    import pyarrow

# An unclosed quote makes the rest of a CSV file one field: stop before it fills the memory.
MAX_CSV_FIELD_CHARACTERS = 2**28
PARQUET_BATCH_ROWS = 256


class OriginFields(NamedTuple):
    """Names of the fields that say where a record came from."""

    id: str | None = None
    """Field of the id; None: `id`, where there is one. A field that is named must be everywhere."""
    url: str | None = None
    """Field of the address; None: `url`, likewise."""


class Record(NamedTuple):
    """One raw document: the text of its fields, its origin, and how far the reader has come."""

    texts: tuple[str, ...]
    """Text of each field that was asked for, in that order."""
    id: str | None
    """Id of the document; None where there is none, or none was asked for."""
    url: str | None
    path: Path
    line: int
    """First line of the document in its file, or its row where the format has no lines; from 1."""
    position: int
    """Bytes read from disk so far; of a compressed file, compressed bytes."""


def expand_inputs(patterns: Sequence[str]) -> tuple[Path, ...]:
    """Return the files that the patterns name: in the order given, each glob sorted.

    FileNotFoundError where a file is missing or a glob matches nothing; ValueError for a folder, a
    suffix that no reader knows, or a file named twice (its documents would count twice).
    """
    paths: list[Path] = []
    for pattern in patterns:
        if Path(pattern).exists() or not glob.has_magic(pattern):
            matches = [Path(pattern)]
        else:
            matches = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
            if not matches:
                raise FileNotFoundError(f"no file matches {pattern!r}")
        for path in matches:
            _check_input(path)
            if path in paths:
                raise ValueError(f"{path}: given twice; its documents would be counted twice")
            paths.append(path)
    return tuple(paths)


def read_files(
    paths: Sequence[Path], fields: Sequence[str], origin: OriginFields | None = None
) -> Iterator[Record]:
    """Yield the records of all files in order; `position` counts bytes over all files.

    `origin` asks for `id` and `url` too. ValueError as the readers raise it, and where no file
    holds any document (empty corpus).
    """
    start, empty = 0, True
    for path in paths:
        for record in READERS[file_format(path)](path, fields, origin):
            empty = False
            # A new tuple: _replace would take a microsecond for each record.
            yield Record(*record[:-1], start + record.position)
        start += path.stat().st_size
    if empty:
        raise ValueError(f"empty corpus: no document in {', '.join(map(str, paths))}")


def read_jsonl(path: Path, fields: Sequence[str], origin: OriginFields | None) -> Iterator[Record]:
    """Yield one record per line of JSON objects; blank lines are skipped. Also .gz and .zst."""
    with path.open("rb") as file:
        for number, line in read_lines(path, file):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            record = _parse_json(where, line)
            texts = tuple(_json_text(where, record, field) for field in fields)
            names = _origin_names(where, record, origin)
            id_, url = _json_origin(record, names[0]), _json_origin(record, names[1])
            if "\\u" in line:
                _check_surrogates(where, [*fields, *names], [*texts, id_, url])
            yield Record(texts, id_, url, path, number, file.tell())


def read_csv(path: Path, fields: Sequence[str], origin: OriginFields | None) -> Iterator[Record]:
    """Yield one record per row of a comma-separated file with a header (RFC 4180 quoting).

    A row with quoted newlines is located by its first line; an empty id or url is none.
    """
    with path.open("rb") as file:
        rows = _csv_rows(path, file)
        number, header = next(rows, (1, list(fields)))
        columns = [_index_of(f"{path}:{number}", header, field) for field in fields]
        names = _origin_names(f"{path}:{number}", header, origin)
        places = [header.index(name) if name else None for name in names]
        for number, row in rows:
            where = f"{path}:{number}"
            if len(row) != len(header):
                raise ValueError(
                    f"{where}: {len(row)} columns where the header has {len(header)}; a text with"
                    " commas, quotes or newlines must be in quotes"
                )
            id_, url = (None if place is None else row[place] or None for place in places)
            texts = tuple(row[column] for column in columns)
            yield Record(texts, id_, url, path, number, file.tell())


def read_parquet(
    path: Path, fields: Sequence[str], origin: OriginFields | None
) -> Iterator[Record]:
    """Yield one record per row of a parquet file; the wanted columns must be strings.

    The columns of `origin` may be of any type that has a text form.
    """
    # Imported here: only this format needs it, and it costs 0.3 s.
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    done = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _check_columns(path, table.schema_arrow, fields)
            names = _origin_names(f"{path}", table.schema_arrow.names, origin)
            wanted = list(dict.fromkeys([*fields, *filter(None, names)]))
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=wanted):
                columns = [
                    _parquet_texts(path, done, field, batch.column(field)) for field in fields
                ]
                ids, urls = (_parquet_origin(path, done, name, batch) for name in names)
                rows = zip(zip(*columns, strict=True), ids, urls, strict=True)
                for row, (texts, id_, url) in enumerate(rows, done + 1):
                    position = size * row // table.metadata.num_rows
                    yield Record(texts, id_, url, path, row, position)
                done += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet after row {done}: {error}") from error


def read_txt(path: Path, fields: Sequence[str], origin: OriginFields | None) -> Iterator[Record]:
    """Yield one record per line that is not blank; the line is the value of the one field.

    It has no id and no url: ValueError where `origin` names one.
    """
    if len(fields) != 1:
        raise ValueError(f"{path}: plain text has one field, not {len(fields)} ({list(fields)})")
    _origin_names(f"{path}", (), origin)
    with path.open("rb") as file:
        for number, line in read_lines(path, file):
            if line.strip():
                yield Record((line.rstrip("\r\n"),), None, None, path, number, file.tell())


READERS: dict[str, Callable[[Path, Sequence[str], OriginFields | None], Iterator[Record]]] = {
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


def _json_origin(record: dict[str, object], name: str | None) -> str | None:
    """Return a string as it is, null as None, and any other value (a number) as its JSON text."""
    value = record[name] if name else None
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _check_surrogates(
    where: str, fields: Sequence[str | None], texts: Sequence[str | None]
) -> None:
    """Refuse half a surrogate pair (\\ud83d alone): legal in JSON, but not text in any encoding."""
    for field, text in zip(fields, texts, strict=True):
        try:
            (text or "").encode("utf-8")
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            raise ValueError(
                f'{where}: field "{field}" holds half a surrogate pair (\\u{half:04x}) at character'
                f" {error.start + 1}; no such character exists"
            ) from None


def _csv_rows(path: Path, file: BinaryIO) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, columns) for the header and every row; no blank lines."""
    csv.field_size_limit(MAX_CSV_FIELD_CHARACTERS)
    rows = csv.reader((line for _, line in read_lines(path, file)), strict=True)
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
    for row, text in enumerate(_parquet_values(path, start, field, column), start + 1):
        if text is None:
            raise ValueError(f'{path}: row {row}: field "{field}" is null, not a string')
        texts.append(text)
    return texts


def _parquet_origin(
    path: Path, start: int, field: str | None, batch: "pyarrow.RecordBatch"
) -> list[str | None]:
    import pyarrow

    if field is None:
        return [None] * batch.num_rows
    try:
        column = batch.column(field).cast(pyarrow.string())
    except pyarrow.ArrowNotImplementedError:
        kind = batch.schema.field(field).type
        raise ValueError(
            f'{path}: field "{field}" is {kind}, which has no text to keep as the id or url of a'
            " document; name another with --id-key or --url-key"
        ) from None
    return list(_parquet_values(path, start, field, column))


def _parquet_values(
    path: Path, start: int, field: str, column: "pyarrow.Array"
) -> Iterator[str | None]:
    for row, value in enumerate(column, start + 1):
        try:
            yield value.as_py()
        except UnicodeDecodeError as error:
            raise ValueError(
                f'{path}: row {row}: field "{field}": invalid UTF-8 at byte {error.start + 1}'
            ) from None


def _origin_names(
    where: str, present: Collection[str], origin: OriginFields | None
) -> tuple[str | None, str | None]:
    """Return the fields that hold the id and the url of a record that has the fields `present`."""
    if origin is None:
        return None, None
    if origin.id is not None and origin.id not in present:
        raise ValueError(f"{where}: {_no_field(origin.id, list(present), 'id', '--id-key')}")
    if origin.url is not None and origin.url not in present:
        raise ValueError(f"{where}: {_no_field(origin.url, list(present), 'url', '--url-key')}")
    id_, url = origin.id or "id", origin.url or "url"
    return id_ if id_ in present else None, url if url in present else None


def _no_field(
    field: str, present: Sequence[str], what: str = "text", option: str = "--json-keys"
) -> str:
    names = ", ".join(f'"{name}"' for name in present[:20]) or "no fields at all"
    return f'no field "{field}"; there are {names}. Name the {what} field with {option}'
