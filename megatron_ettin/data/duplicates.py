"""Documents whose text came before, found over all inputs in bounded memory.

Each input is read once for the SHA-256 of its texts. DuckDB, which spills to disk, finds the first
of equal ones. The first in the order of the inputs is kept, whatever the number of processes.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_ettin.data.encoding import hash_documents
from megatron_ettin.data.preprocess_options import PreprocessOptions, Shard
from megatron_ettin.data.progress import Progress
from megatron_ettin.data.shard_reading import read_shard
from megatron_ettin.publication import publishing

MEMORY_LIMIT = "512MB"
SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("field", pa.int32()),
        ("place", pa.int64()),
        ("sha256", pa.binary(32)),
    ]
)
#: Of documents with one text in one field, all but the first.
LATER_COPIES = """
COPY (
    SELECT shard, field, place FROM (
        SELECT shard, field, place,
            row_number() OVER (PARTITION BY field, sha256 ORDER BY shard, place) AS copy
        FROM read_parquet($hashes)
    ) WHERE copy > 1 ORDER BY shard, field, place
) TO $found (FORMAT parquet)
"""


@dataclass(frozen=True)
class Duplicates:
    """Places in a shard of the documents whose text came before, ascending."""

    places: NDArray[np.int64]

    @classmethod
    def of(cls, options: PreprocessOptions, shard: Shard, field: int) -> Self:
        """Read what `find_duplicates` found for a field of a shard."""
        table = pq.read_table(
            _found(options),
            columns=["place"],
            filters=[("shard", "=", shard.number), ("field", "=", field)],
        )
        return cls(table["place"].to_numpy())

    def among(self, first: int, count: int) -> NDArray[np.bool_]:
        """Return [count] bool: which of the documents from number `first` on came before."""
        begin, end = np.searchsorted(self.places, [first, first + count])
        mask = np.zeros(count, dtype=np.bool_)
        mask[self.places[begin:end] - first] = True
        return mask


def find_duplicates(options: PreprocessOptions) -> None:
    """Read all inputs and store which documents of each shard came before, for each field.

    What an interrupted run stored is used again.
    """
    shards = options.outputs()
    _folder(options).mkdir(parents=True, exist_ok=True)
    raw_bytes = sum(shard.raw_bytes for shard in shards)
    with closing(Progress("finding duplicates", raw_bytes)) as progress:
        for shard in shards:
            if not _hashes(options, shard).exists():
                _hash(options, shard, progress)
            for file in shard.inputs:
                progress.finish_file(file.size)
    with publishing(_found(options)) as found, duckdb.connect() as database:
        database.execute(f"SET memory_limit = '{MEMORY_LIMIT}'")
        # Spilled files are removed with the connection; those of a killed run, with the folder.
        database.execute(
            "SET temp_directory = $folder", {"folder": str(_folder(options) / "spill")}
        )
        hashes = [str(_hashes(options, shard)) for shard in shards]
        database.execute(LATER_COPIES, {"hashes": hashes, "found": str(found)})


def forget_duplicates(options: PreprocessOptions) -> None:
    """Remove what was stored, when all shards are made."""
    shutil.rmtree(_folder(options), ignore_errors=True)


def _hash(options: PreprocessOptions, shard: Shard, progress: Progress) -> None:
    path = _hashes(options, shard)
    with publishing(path) as temporary, pq.ParquetWriter(temporary, SCHEMA) as file:
        for table in _hash_tables(options, shard, progress):
            file.write_table(table)


def _hash_tables(
    options: PreprocessOptions, shard: Shard, progress: Progress
) -> Iterator[pa.Table]:
    first = 0
    # A record that cannot be read is reported when the shard is made; here it is left out, as it
    # is there.
    on_bad = (lambda _: None) if options.quarantines else None
    for _, batch in read_shard(options, shard, on_bad):
        count = len(batch.lines)
        for field in range(len(options.json_keys)):
            hashes = pa.py_buffer(hash_documents(batch, field).tobytes())
            columns = [
                np.full(count, shard.number, dtype=np.int32),
                np.full(count, field, dtype=np.int32),
                np.arange(first, first + count),
                pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), count, [None, hashes]),
            ]
            yield pa.table(columns, schema=SCHEMA)
        first += count
        progress.advance(batch.position, count, 0)


def _folder(options: PreprocessOptions) -> Path:
    return Path(f"{options.output_prefix}.duplicates")


def _found(options: PreprocessOptions) -> Path:
    return _folder(options) / "found.parquet"


def _hashes(options: PreprocessOptions, shard: Shard) -> Path:
    """Return the file of a shard's hashes; its name changes with the inputs and the fields."""
    text = json.dumps([shard.stamps, options.json_keys, options.on_error])
    name = f"{shard.number:05d}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.parquet"
    return _folder(options) / name
