"""Values that are read page by page are those that Arrow reads of the whole file, or refused."""

import hashlib
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ettin import native
from megatron_ettin.data import parquet_pages
from megatron_ettin.data.parquet_pages import Page, has_single_pages, pages_of, read_values

COLUMNS = {"first": 0, "texts": 1, "hashes": 2, "numbers": 3}
HASH = pa.field("hashes", pa.binary(32), nullable=False)


def draw_texts(seed: int, count: int) -> list[str | None]:
    """Draw texts of 0 to 60 characters, some longer than a header is expected to be, some None."""
    random = np.random.default_rng(seed)
    lengths = np.where(random.random(count) < 0.02, 3000, random.integers(0, 60, count))
    letters = ["a", "b", "é", "\U0001f600"]
    texts = ["".join(random.choice(letters, length)) for length in lengths]
    return [None if random.random() < 0.1 else text for text in texts]


def hashes_of(texts: list[str | None]) -> list[bytes]:
    return [hashlib.sha256(repr(text).encode()).digest() for text in texts]


def write(path: Path, texts: list[str | None], **options: object) -> None:
    """Write four columns in row groups of 5,000 rows, as a sidecar is written."""
    table = pa.table({"first": pa.array(texts[::-1], pa.string()), "texts": pa.array(texts)})
    table = table.append_column(HASH, pa.array(hashes_of(texts), HASH.type))
    table = table.append_column("numbers", pa.array(range(len(texts))))
    wanted = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    if not options.get("use_dictionary"):
        wanted["column_encoding"] = {"numbers": "DELTA_BINARY_PACKED"}
    pq.write_table(table, path, row_group_size=5000, **{**wanted, **options})


def draw_rows(seed: int, count: int, total: int) -> list[tuple[int, np.ndarray]]:
    """Draw rows of a file of `total`, by row group."""
    rows = np.unique(np.random.default_rng(seed).integers(0, total, count))
    groups = np.unique(rows // 5000).tolist()
    return [(group, rows[rows // 5000 == group] % 5000) for group in groups]


@pytest.mark.parametrize(
    ("batch_bytes", "page_bytes", "version", "compression"),
    [
        (2**25, 2**20, "1.0", "zstd"),  # as earlier versions wrote sidecars
        (2**25, 20_000, "1.0", "zstd"),
        (1, 20_000, "1.0", "zstd"),
        (50_000, 1, "2.0", "zstd"),
        (2**25, 20_000, "2.0", "snappy"),
        (50_000, 20_000, "1.0", "none"),
    ],
)
def test_the_values_of_rows_are_those_of_the_whole_file(
    batch_bytes: int,
    page_bytes: int,
    version: str,
    compression: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parquet_pages, "BATCH_BYTES", batch_bytes)
    texts = draw_texts(page_bytes, 12_345)
    options = {"data_page_size": page_bytes, "data_page_version": version}
    write(tmp_path / "file", texts, compression=compression, **options)
    whole: dict[str, list[Any]] = {"first": texts[::-1], "texts": texts, "hashes": hashes_of(texts)}
    whole["numbers"] = list(range(len(texts)))
    metadata = pq.read_metadata(tmp_path / "file")
    for seed, count in enumerate((1, 3, 40, 3000)):
        wanted = draw_rows(seed, count, len(texts))
        rows = np.concatenate([5000 * group + rows for group, rows in wanted]).tolist()
        for name, place in COLUMNS.items():
            assert has_single_pages(metadata.row_group(0).column(place))
            found = read_values(tmp_path / "file", metadata, place, wanted)
            assert found.type == pq.read_schema(tmp_path / "file").field(name).type
            assert found.to_pylist() == [whole[name][row] for row in rows]


def all_pages(path: Path, place: int) -> list[Page]:
    metadata = pq.read_metadata(path)
    groups = range(metadata.num_row_groups)
    chunks = [metadata.row_group(group).column(place) for group in groups]
    return [page for chunk in chunks for page in pages_of(path, chunk)]


def test_only_the_pages_that_hold_rows_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "file", draw_texts(1, 12_345), data_page_size=20_000)
    pages = all_pages(tmp_path / "file", 1)
    assert len(pages) > 10
    decoded: list[Page] = []
    decode = parquet_pages._decode

    def count(file: FileIO, column: Any, some: list[Page]) -> pa.ChunkedArray:
        decoded.extend(some)
        return decode(file, column, some)

    monkeypatch.setattr(parquet_pages, "_decode", count)
    metadata = pq.read_metadata(tmp_path / "file")
    wanted = [(0, np.array([4999])), (1, np.array([0, 1]))]
    read_values(tmp_path / "file", metadata, 1, wanted)
    following = [page.first_row for page in pages].index(0, 1)
    assert decoded == pages[following - 1 : following + 1]


def test_no_flipped_bit_of_a_header_gives_other_strings(tmp_path: Path) -> None:
    """No checksum covers headers: every bit of some is flipped."""
    path, texts = tmp_path / "file", draw_texts(2, 6000)
    write(path, texts, data_page_size=20_000)
    good = path.read_bytes()
    wanted = draw_rows(3, 30, len(texts))
    rows = np.concatenate([5000 * group + rows for group, rows in wanted]).tolist()
    expected = [texts[row] for row in rows]
    pages = all_pages(path, 1)
    messages = []
    metadata = pq.read_metadata(path)
    begin = metadata.row_group(0).column(1).data_page_offset
    end = begin + metadata.row_group(0).column(1).total_compressed_size
    lengths = native.page_headers(path, begin, end)[:, 1].tolist()
    # The first bytes of a header hold its numbers; the texts of its statistics follow.
    for page, length in zip(pages[:3], lengths, strict=False):
        for bit in range(8 * min(length, 40)):
            damaged = bytearray(good)
            damaged[page.offset + bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                found = read_values(path, metadata, 1, wanted).to_pylist()
            except ValueError as error:
                messages.append(str(error))
            else:
                assert found == expected
    assert len(messages) > 100
    assert all("byte " in message for message in messages)


def test_a_flipped_bit_of_a_page_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, draw_texts(2, 6000), data_page_size=20_000)
    page = all_pages(path, 1)[2]
    content = bytearray(path.read_bytes())
    content[page.offset + page.num_bytes - 1] ^= 4
    path.write_bytes(content)
    metadata = pq.read_metadata(path)
    others = np.array([0, page.first_row - 1, page.first_row + page.num_rows])
    assert len(read_values(path, metadata, 1, [(0, others)])) == 3
    rows = np.sort(np.append(others, page.first_row))
    with pytest.raises(ValueError, match=f"byte {page.offset}: .*CRC"):
        read_values(path, metadata, 1, [(0, rows)])


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, draw_texts(2, 6000), data_page_size=20_000)
    page = all_pages(path, 1)[2]
    metadata, content = pq.read_metadata(path), path.read_bytes()
    for end, message in ((page.num_bytes - 5, "without end|within a page"), (3, "without end")):
        path.write_bytes(content[: page.offset + end])
        with pytest.raises(ValueError, match=message):
            read_values(path, metadata, 1, [(0, np.array([page.first_row]))])


def test_columns_with_dictionaries_are_left_to_arrow(tmp_path: Path) -> None:
    write(tmp_path / "file", draw_texts(2, 6000), use_dictionary=True)
    metadata = pq.read_metadata(tmp_path / "file")
    assert not has_single_pages(metadata.row_group(0).column(1))


def test_other_bytes_than_headers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content, message in (
        (b"", "byte 0: a header without end"),
        (b"\x15", "byte 0: a header without end"),
        (b"\x15" + b"\xff" * 600, "byte 0: no header of a data page"),
        (b"\x1c" * 600, "byte 0: no header of a data page"),  # structs within structs
        (b"\x19" + bytes(600), "byte 0: no header of a data page"),  # a list
        (b"\x18\xff\x7f" + bytes(600), "byte 0: a header without end"),  # a long text
        (
            b"\x15\x00\x15\x02\x15\xd0\x0f\x2c\x15\x02\x00\x00" + bytes(588),
            "a page that ends after",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            native.page_headers(path, 0, 600)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        native.page_headers(tmp_path / "nowhere", 0, 600)
