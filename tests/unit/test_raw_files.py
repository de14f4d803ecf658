"""Readers against text written with the standard library, and every way a raw file can be bad."""

import csv
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_ettin.data import batches, blocks
from megatron_ettin.data.raw_files import (
    READERS,
    BadRecord,
    OriginFields,
    RawFile,
    read_batches,
    read_text_batches,
)
from megatron_ettin.data.storage import SUFFIXES
from tests.raw_data import (
    TEXTS,
    jsonl_bytes,
    mds_bytes,
    packed,
    raw_file,
    read_rows,
    write_corpus,
)


def read_texts(path: Path, *fields: str) -> list[tuple[str, ...]]:
    return [row.texts for row in read_rows(path, fields or ("text",))]


def write_lines(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join(x.encode() if isinstance(x, str) else x for x in lines))
    return path


@pytest.mark.parametrize("suffix", READERS)
def test_every_suffix_is_known_and_documented(suffix: str) -> None:
    assert suffix in SUFFIXES
    assert RawFile(f"a{suffix}", 0).format == suffix
    document = Path(__file__).parents[2] / "docs" / "data.md"
    rows = [line.split("|")[1] for line in document.read_text().splitlines() if line[:3] == "| `"]
    assert any(f"`{suffix}`" in row for row in rows), "add it to the table of docs/data.md"


def test_every_known_suffix_has_a_reader() -> None:
    assert set(SUFFIXES) == READERS.keys()


@pytest.mark.parametrize("suffix", READERS)
def test_every_format_gives_the_same_texts(tmp_path: Path, suffix: str) -> None:
    path = write_corpus(tmp_path, suffix)
    records = list(read_rows(path, ["text"]))
    expected = [text.replace("\n", " ") if suffix == ".txt" else text for text in TEXTS]
    assert [record.texts for record in records] == [(text,) for text in expected]
    assert records[-1].position == path.stat().st_size
    assert all((record.id, record.url) == (None, None) for record in records)


def test_the_line_is_the_first_one_of_a_document(tmp_path: Path) -> None:
    paths = [write_corpus(tmp_path, suffix) for suffix in (".jsonl", ".csv", ".parquet", ".txt")]
    last = [[r.line for r in read_rows(path, ["text"])][-1] for path in paths]
    # The header and the quoted newline of the third text are lines of the CSV file.
    assert last == [6, 8, 6, 11]


def write_records(path: Path, columns: dict[str, list[Any]]) -> Path:
    """Write columns in the format of the path; in JSON, an id of None is left out."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *(row.values() for row in rows)])
    else:
        some = [{k: v for k, v in row.items() if (k, v) != ("id", None)} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_id_and_url_where_a_record_has_them(tmp_path: Path, suffix: str) -> None:
    columns = {
        "id": ["a", None, "漢🎬", "12"],
        "text": ["b", "c", "d", "e"],
        "url": ["https://x.org/?q=1", None, None, "https://x.org/2"],
    }
    path = write_records(tmp_path / f"a{suffix}", columns)
    records = list(read_rows(path, ["text"], OriginFields()))
    assert [record.id for record in records] == columns["id"]
    assert [record.url for record in records] == columns["url"]
    assert [record.texts for record in records] == [("b",), ("c",), ("d",), ("e",)]
    other = list(read_rows(path, ["text"], OriginFields(id="url", url="text")))
    assert [record.id for record in other if record.id] == ["https://x.org/?q=1", "https://x.org/2"]
    assert [record.url for record in other] == ["b", "c", "d", "e"]


def test_an_id_that_is_no_string_is_kept_as_its_text(tmp_path: Path) -> None:
    lines = ["12345678901234567890", "1.5", "true", '["ä", 2]', '{"n": 1}', "null", '""', '"7"']
    path = write_lines(tmp_path / "a.jsonl", *(f'{{"id": {x}, "text": "a"}}\n' for x in lines))
    found = [record.id for record in read_rows(path, ["text"], OriginFields())]
    assert found == [*lines[:5], None, "", "7"]
    days = pa.array([0, 1], pa.int32()).cast(pa.date32())
    for column, expected in [
        (pa.array([2**63, 7], pa.uint64()), ["9223372036854775808", "7"]),
        (pa.array([-5, None], pa.int32()), ["-5", None]),
        (pa.array(["b", "a"]).dictionary_encode(), ["b", "a"]),
        (pa.array(["b", "a"], pa.large_string()), ["b", "a"]),
        (pa.nulls(2), [None, None]),
        (days, ["1970-01-01", "1970-01-02"]),
    ]:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"id": column, "text": ["a", "b"]}), path)
        assert [r.id for r in read_rows(path, ["text"], OriginFields())] == expected


def test_a_field_may_be_the_text_and_the_id(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".csv", ".parquet"):
        path = write_records(tmp_path / f"a{suffix}", {"id": ["a", "b"]})
        records = read_rows(path, ["id"], OriginFields())
        assert [(*record.texts, record.id) for record in records] == [("a", "a"), ("b", "b")]


def test_an_origin_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    paths = [
        write_records(tmp_path / f"a{suffix}", {"id": ["a"], "text": ["b"]})
        for suffix in (".jsonl", ".csv", ".parquet")
    ]
    places = [":1", ":1", ""]
    for path, place in zip(paths, places, strict=True):
        message = f'{path}{place}: no field "uid"; there are "id", "text". Name the id field with'
        with pytest.raises(ValueError, match=re.escape(f"{message} --id-key")):
            list(read_rows(path, ["text"], OriginFields(id="uid")))
        with pytest.raises(ValueError, match="Name the url field with --url-key"):
            list(read_rows(path, ["text"], OriginFields(url="link")))
    text = write_lines(tmp_path / "a.txt", "a\n")
    with pytest.raises(ValueError, match=re.escape(f'{text}: no field "id"; there are no fields')):
        list(read_rows(text, ["text"], OriginFields(id="id")))
    half = write_lines(tmp_path / "half.jsonl", '{"id": "\\ud83d", "text": ""}\n')
    with pytest.raises(ValueError, match=re.escape(f'{half}:1: field "id" holds half a surrogate')):
        list(read_rows(half, ["text"], OriginFields()))
    nested = tmp_path / "nested.parquet"
    pq.write_table(pa.table({"url": [["a"]], "text": ["a"]}), nested)
    with pytest.raises(ValueError, match=re.escape(f'{nested}: field "url" is list<')):
        list(read_rows(nested, ["text"], OriginFields()))


def test_positions_run_over_all_files(tmp_path: Path) -> None:
    paths = [write_corpus(tmp_path, suffix) for suffix in (".jsonl", ".parquet", ".csv")]
    files = [raw_file(path) for path in paths]
    positions = [batch.position for batch in read_text_batches(files, ["text"])]
    assert positions == sorted(positions)
    assert positions[-1] == sum(path.stat().st_size for path in paths)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_several_fields_in_the_order_asked_for(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"two{suffix}"
    if suffix == ".jsonl":
        write_lines(path, '{"title": "a", "n": 1, "text": "b"}\n')
    elif suffix == ".csv":
        write_lines(path, "title,n,text\n", "a,1,b\n")
    else:
        pq.write_table(pa.table({"title": ["a"], "n": [1], "text": ["b"]}), path)
    assert read_texts(path, "text", "title") == [("b", "a")]


def test_byte_order_mark_crlf_and_blank_lines_are_no_text(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    jsonl = write_lines(tmp_path / "a.jsonl", bom, '{"text": "a"}\r\n', "\r\n", '{"text": "b"}')
    table = write_lines(tmp_path / "a.csv", bom, "text\r\n", '"a"\r\n', "\r\n", "b")
    text = write_lines(tmp_path / "a.txt", bom, "a\r\n", " \r\n", "b")
    for path in (jsonl, table, text):
        assert read_texts(path) == [("a",), ("b",)]


def test_csv_field_larger_than_the_library_allows_by_default(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.csv", "text\n", '"' + "long\n" * 100_000 + '"\n')
    assert read_texts(path) == [("long\n" * 100_000,)]


def test_parquet_dictionary_and_large_strings(tmp_path: Path) -> None:
    columns = [pa.array(["a", "b", "a"]).dictionary_encode(), pa.array(list("aba"), "large_string")]
    for number, column in enumerate(columns):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"text": column}), path)
        assert read_texts(path) == [("a",), ("b",), ("a",)]


def test_several_compressed_members_and_frames_are_one_file(tmp_path: Path) -> None:
    skippable = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"skip"
    lines = jsonl_bytes().splitlines(keepends=True)
    half = [b"".join(lines[:3]), b"".join(lines[3:])]
    gz = write_lines(tmp_path / "a.jsonl.gz", *map(gzip.compress, half))
    zst = write_lines(tmp_path / "a.jsonl.zst", skippable, *map(zstandard.compress, half))
    for path in (gz, zst):
        assert read_texts(path) == [(text,) for text in TEXTS]


def test_zstd_with_a_large_window(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = compressor.compress(jsonl_bytes()) + compressor.flush()
    assert len(read_texts(write_lines(tmp_path / "a.jsonl.zst", data))) == len(TEXTS)


GOOD = '{"text": "good"}\n'
BAD_LINES = {
    "json": (b'{"text": "x"\n', ":2: invalid JSON at column 13: Expecting ',' delimiter"),
    "utf-8": (b'{"text": "\xff"}\n', ":2: invalid UTF-8 at byte 11 of the line (0xff: invalid"),
    "field": (b'{"id": 1, "body": ""}\n', ':2: no field "text"; there are "id", "body". Name'),
    "no fields": (b"{}\n", ':2: no field "text"; there are no fields at all'),
    "number": (b'{"text": 1}\n', ':2: field "text" is a number, not a string'),
    "null": (b'{"text": null}\n', ':2: field "text" is null, not a string'),
    "list": (b'{"text": ["a"]}\n', ':2: field "text" is an array, not a string'),
    "no object": (b'"text"\n', ":2: a JSON object is needed, found a string"),
    "two records": (b'{"text": "a"}{"text": "b"}\n', ":2: invalid JSON at column 14: Extra data"),
    "surrogate": (
        b'{"text": "ab\\ud83d"}\n',
        ':2: field "text" holds half a surrogate pair (\\ud83d) at character 3',
    ),
    "deep": (b"[" * 200_000 + b"\n", ":2: JSON that cannot be read: maximum recursion depth"),
    "digits": (b'{"n": ' + b"9" * 5000 + b"}\n", ":2: JSON that cannot be read: Exceeds the limit"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, name: str) -> None:
    line, message = BAD_LINES[name]
    path = write_lines(tmp_path / "a.jsonl", GOOD, line, GOOD)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}{message}")):
        read_texts(path)


BAD_CSV = {
    "field": ("id,body\n1,2\n", ':1: no field "text"; there are "id", "body"'),
    "columns": ("id,text\n1,a\n\n2,b,c\n", ":4: 3 columns where the header has 2"),
    "open quote": (
        'id,text\n1,a\n2,"b\nc\nd',
        ":3: invalid CSV in the record that begins on this line, noticed on line 5: unexpected end",
    ),
    "stray quote": ('id,text\n1,"a"b\n', ":2: invalid CSV"),
}


@pytest.mark.parametrize("name", BAD_CSV)
def test_bad_csv_is_named(tmp_path: Path, name: str) -> None:
    content, message = BAD_CSV[name]
    path = write_lines(tmp_path / "a.csv", content)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}{message}")):
        read_texts(path)


def test_bad_utf8_in_csv_and_txt(tmp_path: Path) -> None:
    for suffix in (".csv", ".txt"):
        path = write_lines(tmp_path / f"a{suffix}", "text\n", b"caf\xe9\n")
        with pytest.raises(ValueError, match=re.escape(f"{path}:2: invalid UTF-8 at byte 4")):
            read_texts(path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_truncated_and_damaged_compression(tmp_path: Path, suffix: str) -> None:
    path = write_corpus(tmp_path, suffix)
    whole = path.read_bytes()
    read_texts(path)
    for data in (whole[:-9], whole[: len(whole) // 2], whole + b"rubbish", b"\x00" * 50):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(f"{path}: compressed data truncated or")):
            read_texts(path)


def test_bad_parquet(tmp_path: Path) -> None:
    invalid = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    cases = [
        ({"body": ["a"]}, ': no field "text"; there are "body"'),
        ({"text": [1]}, ': field "text" is int64, not a string'),
        ({"text": pa.array([b"a"])}, ': field "text" is binary, not a string'),
        ({"text": ["a", None]}, ': row 2: field "text" is null, not a string'),
        ({"text": invalid}, ': row 1: field "text": invalid UTF-8 at byte 2'),
    ]
    path = tmp_path / "a.parquet"
    for columns, message in cases:
        pq.write_table(pa.table(columns), path)
        with pytest.raises(ValueError, match="^" + re.escape(f"{path}{message}")):
            read_texts(path)
    pq.write_table(pa.table({"text": TEXTS}), path)
    whole = path.read_bytes()
    for data in (whole[:-20], b"", whole[:4] + b"\xff" * 100 + whole[104:]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(f"{path}: cannot be read as parquet")):
            read_texts(path)


def test_plain_text_has_one_field(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.txt", "a\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}: plain text has one field, not 2")):
        read_texts(path, "title", "text")


@pytest.mark.parametrize("content", ["", "\n\n", "text\n"])
def test_a_corpus_without_documents_is_an_error_a_file_is_not(tmp_path: Path, content: str) -> None:
    suffix = ".csv" if content == "text\n" else ".txt"
    empty = write_lines(tmp_path / f"empty{suffix}", content)
    assert read_texts(empty) == []
    with pytest.raises(ValueError, match=re.escape(f"empty corpus: no document in {empty}")):
        list(read_text_batches([raw_file(empty)], ["text"]))
    other = write_lines(tmp_path / "a.jsonl", GOOD)
    (batch,) = read_text_batches([raw_file(empty), raw_file(other)], ["text"])
    assert batch.texts == (["good"],)


def bad_records(path: Path, *fields: str) -> tuple[list[str], list[BadRecord]]:
    """Read a file to its end; return the first field and what is bad."""
    bad: list[BadRecord] = []
    texts: list[str] = []
    for batch in read_batches(
        raw_file(path), fields or ("text",), OriginFields(), on_bad=bad.append
    ):
        texts += batch.texts[0]  # type: ignore[union-attr]
    return texts, bad


@pytest.mark.parametrize("name", BAD_LINES)
def test_reading_goes_on_after_a_bad_line(tmp_path: Path, name: str) -> None:
    line, message = BAD_LINES[name]
    path = write_lines(tmp_path / "a.jsonl", GOOD, line, GOOD)
    texts, (bad,) = bad_records(path)
    assert texts == ["good", "good"]
    assert (bad.path, bad.line, bad.content) == (str(path), 2, line.rstrip(b"\n"))
    assert bad.reason.startswith(message.removeprefix(":2: "))


def test_reading_goes_on_after_a_bad_row(tmp_path: Path) -> None:
    table = write_lines(tmp_path / "a.csv", 'id,text\n1,a\n2,"b\n', b'\xff"\n', "3\n4,d\n")
    texts, bad = bad_records(table)
    assert texts == ["a", "d"]
    assert [(b.line, b.content) for b in bad] == [(3, b'2,"b\n\xff"'), (5, b"3")]
    assert bad[0].reason.startswith("invalid UTF-8 at byte 1 of the line")
    assert bad[1].reason.startswith("1 columns where the header has 2")
    text = write_lines(tmp_path / "a.txt", "a\n", b"caf\xe9\n", "b")
    texts, bad = bad_records(text)
    assert (texts, [(b.line, b.content) for b in bad]) == (["a", "b"], [(2, b"caf\xe9")])
    rows = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": ["a", None, "b", None], "title": [None, None, "c", "d"]}), rows
    )
    texts, bad = bad_records(rows, "text", "title")
    assert texts == ["b"]
    assert [(b.line, b.reason) for b in bad] == [
        (1, 'field "title" is null, not a string'),
        (2, 'field "text" is null, not a string'),
        (4, 'field "text" is null, not a string'),
    ]


def test_a_file_that_is_bad_as_a_whole_is_an_error_all_the_same(tmp_path: Path) -> None:
    cases = [
        write_lines(tmp_path / "a.jsonl.gz", gzip.compress(jsonl_bytes())[:-5]),
        write_lines(tmp_path / "a.csv", "body\na\n"),
        write_lines(tmp_path / "b.csv", 'text\n"a'),
        write_lines(tmp_path / "a.parquet", "PAR1"),
    ]
    for path in cases:
        with pytest.raises(ValueError, match=re.escape(str(path))):
            bad_records(path)


@pytest.mark.parametrize("suffix", READERS)
def test_the_digest_is_that_of_the_bytes(tmp_path: Path, suffix: str) -> None:
    path = write_corpus(tmp_path, suffix)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    unread, read = raw_file(path), raw_file(path)
    assert unread.digest() == (path.stat().st_size, expected)
    list(read_rows(read))
    path.touch()
    assert read.digest().sha256 == expected
    path.unlink()
    if suffix not in (".parquet", ".arrow"):
        assert read.digest().sha256 == expected


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("change", ["grow", "shrink"])
def test_a_file_that_changes_its_size_is_an_error(tmp_path: Path, suffix: str, change: str) -> None:
    path = write_corpus(tmp_path, suffix)
    file = raw_file(path)
    content = path.read_bytes()
    path.write_bytes(content + content if change == "grow" else content[: len(content) // 2])
    with pytest.raises(ValueError, match=re.escape(f"{path}: changed while it was in use: it had")):
        list(read_rows(file))
    with pytest.raises(ValueError, match="changed while it was in use"):
        RawFile(str(path), len(content)).digest()


def test_a_file_that_grows_after_its_first_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_batches(monkeypatch, 50)
    path = write_lines(tmp_path / "a.jsonl", *[GOOD] * 100)
    reading = read_batches(raw_file(path), ["text"])
    next(reading)
    with path.open("a") as file:
        file.write(GOOD)
    with pytest.raises(ValueError, match="1700 bytes, 1717 bytes were read, and now has 1717"):
        list(reading)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", GOOD)
    path.chmod(0)
    with pytest.raises(PermissionError, match=re.escape(str(path))):
        read_texts(path)


def small_batches(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for module in (batches, blocks):
        monkeypatch.setattr(module, "BATCH_BYTES", size)


@pytest.mark.parametrize("suffix", READERS)
def test_batches_are_small_and_a_large_document_is_alone(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_batches(monkeypatch, 300)
    expected = [f"{n:03}" * (n % 7 + 1) for n in range(200)]
    expected[50] = expected[77] = expected[78] = expected[199] = "long" * 400
    path = tmp_path / f"a{suffix}"
    table = pa.table({"text": expected})
    if suffix == ".parquet":
        pq.write_table(table, path)
    elif suffix == ".arrow":
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    elif suffix.startswith(".mds"):
        content = mds_bytes({"text": "str"}, [{"text": text} for text in expected])
        path.write_bytes(packed(content, path.suffix))
    elif suffix in (".csv", ".txt"):
        path.write_text("\n".join([*(["text"] * (suffix == ".csv")), *expected]))
    else:
        content = "".join(json.dumps({"text": text}) + "\n" for text in expected).encode()
        path.write_bytes(packed(content, path.suffix))
    found = list(read_batches(raw_file(path), ["text"]))
    columns = [batch.texts[0] for batch in found]  # type: ignore[union-attr]
    assert [text for column in columns for text in column] == expected
    assert all(len(column) == 1 or sum(map(len, column)) <= 600 for column in columns)
    assert sum(column == ["long" * 400] for column in columns) == 4
    assert 10 < len(columns) < 60
    assert [line for batch in found for line in batch.lines] == [
        number + (suffix == ".csv") for number in range(1, 201)
    ]
    positions = [batch.position for batch in found]
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size


@pytest.mark.slow
def test_a_line_of_100_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(GOOD.encode() + b'{"text": "')
        for _ in range(100):
            file.write(b"0123456789abcde\\n" * 2**16)
        file.write(b'"}\n' + GOOD.encode())
    program = f"""
import resource
from megatron_ettin.data.raw_files import RawFile, read_batches
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
file = RawFile({str(path)!r}, {path.stat().st_size})
sizes = [[len(text) for text in batch.texts[0]] for batch in read_batches(file, ["text"])]
print(sizes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    sizes, megabytes = done.stdout.rsplit(" ", 1)
    assert sizes == f"[[4], [{100 * 2**20}], [4]]", done.stderr
    assert int(megabytes) < 350
