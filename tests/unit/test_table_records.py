"""Arrow files and MDS shards: their documents, and every way they can be bad."""

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ettin.data.batches import BadRecord
from megatron_ettin.data.raw_files import OriginFields, TokenBatch, read_batches
from tests.raw_data import TEXTS, Row, mds_bytes, packed, raw_file, read_rows, write_corpus

ROWS = [{"id": f"d{n}", "text": text} for n, text in enumerate(TEXTS)]


def write_arrow(path: Path, table: pa.Table, kind: str) -> Path:
    maker = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with maker(path, table.schema) as file:
        file.write_table(table, 2)
    return path


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_both_kinds_of_arrow_file(tmp_path: Path, kind: str) -> None:
    columns = [
        pa.array(TEXTS),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS).dictionary_encode(),
    ]
    for column in columns:
        table = pa.table({"text": column, "id": range(6), "x": [[1]] * 6})
        path = write_arrow(tmp_path / "a.arrow", table, kind)
        rows = list(read_rows(path, origin=OriginFields()))
        assert [(*row.texts, row.id) for row in rows] == [
            (text, str(n)) for n, text in enumerate(TEXTS)
        ]
        assert [row.line for row in rows] == [1, 2, 3, 4, 5, 6]
        assert rows[-1].position == path.stat().st_size
        assert 0 < rows[0].position < path.stat().st_size
        with pytest.raises(ValueError, match=re.escape(f'{path}: no field "body"; there are')):
            list(read_rows(path, ["body"]))
    empty = write_arrow(tmp_path / "b.arrow", pa.table({"text": pa.array([], "string")}), kind)
    assert list(read_rows(empty)) == []
    with pytest.raises(ValueError, match="no field"):
        list(read_rows(empty, ["body"]))


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_an_arrow_file_that_is_cut_anywhere(tmp_path: Path, kind: str) -> None:
    path = write_arrow(tmp_path / "a.arrow", pa.table({"text": TEXTS}), kind)
    whole = path.read_bytes()
    for size in {*range(0, len(whole), 16), *range(len(whole) - 9, len(whole))}:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=re.escape(f"{path}: cannot be read as arrow after")):
            list(read_rows(path))
    path.write_bytes(whole + b"rubbish!" * 2)
    with pytest.raises(ValueError, match=re.escape(f"{path}: cannot be read as arrow after")):
        list(read_rows(path))


def test_a_parquet_file_that_is_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=re.escape(f"{path}: cannot be read as parquet after")):
            list(read_rows(path))


def test_null_and_bad_utf8_in_arrow(tmp_path: Path) -> None:
    offsets = pa.py_buffer(struct.pack("<4i", 0, 1, 3, 4))
    invalid = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xe9bc")])
    path = write_arrow(tmp_path / "a.arrow", pa.table({"text": invalid}), "stream")
    message = f'{path}: row 2: field "text": invalid UTF-8 at byte 1'
    with pytest.raises(ValueError, match=re.escape(message)):
        list(read_rows(path))
    bad: list[BadRecord] = []
    found = list(read_batches(raw_file(path), ["text"], on_bad=bad.append))
    assert [batch.lines for batch in found] == [range(1, 2), range(3, 4)]
    assert [record.line for record in bad] == [2]


def write_mds(path: Path, columns: dict[str, str], samples: list[dict[str, Any]]) -> Path:
    path.write_bytes(packed(mds_bytes(columns, samples), path.suffix))
    return path


def test_texts_of_a_shard(tmp_path: Path) -> None:
    samples = [
        {"n": n, "score": n / 2, "text": text, "title": text[:3], "url": f'["{n}"]'}
        for n, text in enumerate(TEXTS)
    ]
    columns = {"n": "int", "score": "float64", "text": "str", "title": "str", "url": "json"}
    path = write_mds(tmp_path / "a.mds", columns, samples)
    rows = list(read_rows(path, ["title", "text"], OriginFields(id="n")))
    assert [row.texts for row in rows] == [(text[:3], text) for text in TEXTS]
    assert [row.id for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert rows[1].url == '["1"]'
    assert [row.line for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row.id for row in read_rows(path, origin=OriginFields(id="score"))][1] == "0.5"


@pytest.mark.parametrize(
    ("encoding", "dtype"),
    [
        ("ndarray", "uint16"),
        ("ndarray", "uint32"),
        ("ndarray", "int64"),
        ("ndarray:uint32", "uint32"),
        ("ndarray:int32", "int32"),
        ("bytes", "uint16"),
        ("bytes", "uint32"),
        ("bytes", "int64"),
    ],
)
@pytest.mark.parametrize("suffix", [".mds", ".mds.zstd"])
def test_ids_of_a_shard(tmp_path: Path, encoding: str, dtype: str, suffix: str) -> None:
    random = np.random.default_rng(3)
    arrays = [random.integers(0, 50368, size=n).astype(dtype) for n in (3, 300, 1, 1024)]
    samples = [
        {"id": f"d{n}", "input_ids": array.tobytes() if encoding == "bytes" else array}
        for n, array in enumerate(arrays)
    ]
    path = write_mds(tmp_path / f"a{suffix}", {"id": "str", "input_ids": encoding}, samples)
    for field in ("text", "input_ids"):
        (batch,) = read_batches(raw_file(path), [field], OriginFields())
        assert isinstance(batch, TokenBatch)
        assert batch.tokens.dtype == np.int32
        assert batch.tokens.tolist() == np.concatenate(arrays).tolist()
        assert batch.lengths.tolist() == [3, 300, 1, 1024]
        assert (batch.ids, batch.urls) == (["d0", "d1", "d2", "d3"], None)
        assert batch.lines == range(1, 5)
        assert batch.position == path.stat().st_size


def test_arrays_of_one_shape(tmp_path: Path) -> None:
    samples = [{"input_ids": np.arange(4, dtype=np.uint32) + n} for n in range(3)]
    path = write_mds(tmp_path / "a.mds", {"input_ids": "ndarray:uint32:4"}, samples)
    (batch,) = read_batches(raw_file(path), ["text"])
    assert isinstance(batch, TokenBatch)
    assert batch.tokens.tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5]


def test_values_that_are_no_ids(tmp_path: Path) -> None:
    good = {"input_ids": np.array([1, 2], np.int64)}
    cases = [
        (np.array([-1], np.int64), "row 2: holds -1; token ids are 0 to 2147483647"),
        (np.array([2**31], np.int64), "row 2: holds 2147483648; token ids"),
        (np.array([[1, 2]], np.int64), "row 2: an array of int64 with 2 axes"),
        (b"\x41", "row 2: no array of token ids"),
        (b"\x05\x04\x01\x00", "row 2: no array of token ids"),
    ]
    for value, message in cases:
        samples = [good, {"input_ids": value}, good]
        path = write_mds(tmp_path / "a.mds", {"input_ids": "ndarray"}, samples)
        with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
            list(read_batches(raw_file(path), ["input_ids"]))
        bad: list[BadRecord] = []
        (batch,) = read_batches(raw_file(path), ["input_ids"], on_bad=bad.append)
        assert batch.lines == [1, 3]
        assert [record.line for record in bad] == [2]
    path = write_mds(tmp_path / "b.mds", {"input_ids": "bytes"}, [{"input_ids": b"abc"}])
    with pytest.raises(ValueError, match="holds bytes that are no token ids of type int64, uint32"):
        list(read_batches(raw_file(path), ["input_ids"]))


def test_columns_that_a_shard_does_not_have(tmp_path: Path) -> None:
    path = write_mds(tmp_path / "a.mds", {"id": "int", "text": "str"}, [{"id": 1, "text": "a"}])
    cases: list[tuple[list[str], OriginFields | None, str]] = [
        (["body"], None, 'no field "body"; there are "id", "text"'),
        (["id"], None, 'field "id" is int, not a string'),
        (["text"], OriginFields(url="link"), 'no field "link"'),
    ]
    for fields, origin, message in cases:
        with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
            list(read_batches(raw_file(path), fields, origin))


def test_bad_utf8_in_a_shard(tmp_path: Path) -> None:
    samples = [{"text": "a"}, {"text": b"b\xff"}, {"text": "c"}]
    path = write_mds(tmp_path / "a.mds", {"text": "str"}, samples)
    with pytest.raises(ValueError, match=re.escape(f'{path}: row 2: field "text": invalid UTF-8')):
        list(read_rows(path))
    bad: list[BadRecord] = []
    (batch,) = read_batches(raw_file(path), ["text"], on_bad=bad.append)
    assert batch.lines == [1, 3]
    assert [record[1:] for record in bad] == [
        (2, 'field "text": invalid UTF-8 at byte 2', b"b\xff")
    ]


@pytest.mark.parametrize("suffix", [".mds", ".mds.gz", ".mds.zstd"])
def test_a_shard_that_is_cut_anywhere(tmp_path: Path, suffix: str) -> None:
    path = write_corpus(tmp_path, suffix)
    whole = path.read_bytes()
    for content in [*(whole[:size] for size in range(0, len(whole), 3)), whole + b"x"]:
        path.write_bytes(content)
        message = f"{path}: MDS shard truncated or damaged at byte "
        with pytest.raises(ValueError, match=re.escape(message)):
            list(read_rows(path))


def test_a_shard_with_wrong_bytes_is_an_error_or_other_text(tmp_path: Path) -> None:
    path = write_corpus(tmp_path, ".mds")
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xA5]) + whole[place + 1 :])
        found = rows_or_error(path)
        assert str(path) in found if isinstance(found, str) else len(found) == len(TEXTS)


def rows_or_error(path: Path) -> list[Row] | str:
    try:
        return list(read_rows(path))
    except ValueError as error:
        return str(error)
