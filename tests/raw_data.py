"""Raw files that tests write with other libraries or by their definition, and read as rows."""

import csv
import gzip
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from megatron_ettin.data.raw_files import OriginFields, RawFile, TokenBatch, read_batches

TEXTS = [
    "plain",
    'quotes "inside", and a comma',
    "two\nlines",
    "ünïcödé 漢字 🎬",
    "line separator \u2028 and form feed \x0c inside",
    "  spaces around  ",
]
MDS_DTYPES = {"uint8": 8, "int8": 9, "uint16": 16, "uint32": 32, "int32": 33, "int64": 65}


class Row(NamedTuple):
    """One document of a batch."""

    texts: tuple[str, ...]
    id: str | None
    url: str | None
    line: int
    position: int


def raw_file(path: Path | str) -> RawFile:
    return RawFile(str(path), Path(path).stat().st_size)


def read_rows(
    file: RawFile | Path, fields: Sequence[str] = ("text",), origin: OriginFields | None = None
) -> Iterator[Row]:
    """Yield the documents of a file one by one, and check the shape of the batches."""
    file = file if isinstance(file, RawFile) else raw_file(file)
    for batch in read_batches(file, fields, origin):
        assert not isinstance(batch, TokenBatch)
        count = len(batch.lines)
        assert count > 0
        if len(range(batch.lines[0], batch.lines[-1] + 1)) == count:
            assert isinstance(batch.lines, range)
        for names in (batch.ids, batch.urls):
            assert names is None or (len(names) == count and set(names) != {None})
        ids, urls = batch.ids or [None] * count, batch.urls or [None] * count
        columns = (zip(*batch.texts, strict=True), ids, urls, batch.lines)
        for row in zip(*columns, strict=True):
            yield Row(*row, batch.position)


def jsonl_bytes() -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS).encode()


def write_corpus(folder: Path, suffix: str) -> Path:
    """Write TEXTS in the format of the suffix with a library that is not under test."""
    path = folder / f"corpus{suffix}"
    table = pa.table({"id": [1] * len(TEXTS), "text": TEXTS})
    if suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "text"), *(("1", text) for text in TEXTS)])
    elif suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    elif suffix == ".arrow":
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, 2)
    elif suffix == ".txt":
        path.write_text("\n\n".join(text.replace("\n", " ") for text in TEXTS), encoding="utf-8")
    else:
        data = jsonl_bytes()
        if suffix.startswith(".mds"):
            samples = [{"id": 1, "text": text} for text in TEXTS]
            data = mds_bytes({"id": "int", "text": "str"}, samples)
        path.write_bytes(packed(data, path.suffix))
    return path


def packed(data: bytes, suffix: str) -> bytes:
    """Compress as the suffix says."""
    if suffix == ".gz":
        return gzip.compress(data)
    return zstandard.compress(data) if suffix in (".zst", ".zstd") else data


def mds_bytes(columns: dict[str, str], samples: Sequence[dict[str, Any]]) -> bytes:
    """Write an MDS shard by its definition, field by field."""
    fixed = {"int": 8, "uint32": 4, "float64": 8}
    config = json.dumps(
        {
            "column_encodings": list(columns.values()),
            "column_names": list(columns),
            "column_sizes": [fixed.get(encoding) for encoding in columns.values()],
            "format": "mds",
        },
        sort_keys=True,
    ).encode()
    bodies = []
    for sample in samples:
        values = [mds_value(encoding, sample[name]) for name, encoding in columns.items()]
        free = [
            len(value)
            for value, encoding in zip(values, columns.values(), strict=True)
            if encoding not in fixed
        ]
        bodies.append(struct.pack(f"<{len(free)}I", *free) + b"".join(values))
    begin = 4 + 4 * (len(bodies) + 1) + len(config)
    places = [begin + sum(map(len, bodies[:n])) for n in range(len(bodies) + 1)]
    return struct.pack(f"<{len(places) + 1}I", len(bodies), *places) + config + b"".join(bodies)


def mds_value(encoding: str, value: Any) -> bytes:
    """Encode a value: bytes as they are, arrays with the parts that the encoding leaves open."""
    if isinstance(value, bytes):
        return value
    if encoding in ("str", "json", "str_int"):
        return str(value).encode()
    if not encoding.startswith("ndarray"):
        return struct.pack({"int": "<q", "uint32": "<I", "float64": "<d"}[encoding], value)
    parts = encoding.split(":")
    array: np.ndarray[Any, Any] = value
    data = b"" if len(parts) > 1 else bytes([MDS_DTYPES[array.dtype.name]])
    if len(parts) < 3:
        width = 0 if max(array.shape) < 2**8 else 1
        data += bytes([array.ndim << 2 | width])
        data += b"".join(length.to_bytes(1 << width, "little") for length in array.shape)
    return data + array.tobytes()
