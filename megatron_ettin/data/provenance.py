"""Provenance of a corpus: `PREFIX.docs.parquet`, one row per document.

Row n is document n of PREFIX.bin. The file is written in constant memory, together with the corpus,
and read one row group at a time, so that its size does not matter.
"""

import contextlib
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_ettin.data.arrow_columns import int64_column, line_numbers, text_column
from megatron_ettin.data.bloom_filters import damaged_sidecar, groups_that_may_hold
from megatron_ettin.data.corpus_tokenizer import METADATA_KEY
from megatron_ettin.data.encoding import EncodedPart
from megatron_ettin.data.parquet_pages import has_single_pages, read_values
from megatron_ettin.data.raw_files import TextBatch, TokenBatch
from megatron_ettin.native import TokenFileBuilder
from megatron_ettin.publication import sync

FORMAT = "megatron-ettin-documents/1"
SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("id", pa.string()),
        pa.field("url", pa.string()),
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("n_tokens", pa.int64(), nullable=False),
        pa.field("shard", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
    ],
    metadata={"format": FORMAT},
)
"""docs/data.md says what the columns hold."""

GROUP_DOCUMENTS = 2**16
PAGE_BYTES = 2**17
"""Bytes of a page, before compression: a look-up decodes a page, and reads the headers of all."""
FEW_DOCUMENTS = 8
"""Documents of a row group that are looked up page by page: more would need most pages."""
SINGLE_PAGES = ("ordinal", "id", "url", "sha256")
"""Columns of which single pages are read: whole, they take most of the time of a look-up."""
BLOOM_FILTER = {"ndv": GROUP_DOCUMENTS, "fpp": 0.01}
"""Bloom filters of id and sha256: documents, error rate of 16 bits each (Parquet rounds)."""
# Bytes of an .idx with one sequence per document: header and last document boundary; then, for each
# document, its length, offset and boundary.
INDEX_BYTES = 34 + 8
INDEX_BYTES_PER_DOCUMENT = 4 + 8 + 8


def sidecar_path(prefix: str | Path) -> Path:
    """Return the path of a corpus' sidecar."""
    return Path(f"{prefix}.docs.parquet")


def sidecar_writer(destination: Path | BinaryIO) -> pq.ParquetWriter:
    """Return a writer of tables of SCHEMA, in row groups of GROUP_DOCUMENTS but for the last."""
    return pq.ParquetWriter(
        destination,
        SCHEMA,
        compression="zstd",
        use_dictionary=["shard"],
        column_encoding=dict.fromkeys(("ordinal", "n_tokens", "line"), "DELTA_BINARY_PACKED"),
        data_page_size=PAGE_BYTES,
        write_page_checksum=True,
        bloom_filter_options=dict.fromkeys(("id", "sha256"), BLOOM_FILTER),
    )


class CorpusWriter:
    """Writer of a corpus and its sidecar; the block's normal end publishes both, an exception none.

    Files get their names in the order .bin, sidecar, .idx: if the .idx exists, all three are
    complete.
    """

    def __init__(self, prefix: Path, dtype: str, *, tokenizer_sha256: str) -> None:
        """Start PREFIX.bin.tmp, .idx.tmp and .docs.parquet.tmp; raises as `TokenFileBuilder`.

        `tokenizer_sha256` is that of tokenizer.json; the sidecar's metadata keep it.
        """
        # The pair first: it refuses a second writer of this prefix, who would truncate our sidecar.
        self._pair = TokenFileBuilder(prefix, dtype)
        self._path = sidecar_path(prefix)
        self._sidecar = _SidecarFile(Path(f"{self._path}.tmp"), tokenizer_sha256)

    def __enter__(self) -> Self:
        return self

    def add(self, part: EncodedPart, batch: TextBatch | TokenBatch, shard: str) -> None:
        """Add the documents that a batch of the raw file `shard` gave to this corpus."""
        self._pair.add_many(part.tokens, part.lengths)
        self._sidecar.add(part, batch, shard)

    def commit(self) -> None:
        """Publish, replacing what is there; OSError naming the file where that fails."""
        self._sidecar.finish()
        self._pair.commit(self._path)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        published = False
        try:
            if kind is None:
                self.commit()
                published = True
        finally:
            if not published:
                # The sidecar before the pair, whose lock keeps other writers of this prefix away.
                self._sidecar.discard()
                self._pair.abort()


class _SidecarFile:
    """Parquet file with row groups of one size; `finish` returns when it is on the device."""

    def __init__(self, path: Path, tokenizer_sha256: str) -> None:
        self._path = path
        self._tokenizer_sha256 = tokenizer_sha256
        self._file = path.open("wb")
        self._writer = sidecar_writer(self._file)
        self._pending: list[pa.Table] = []
        self._documents = 0
        self._tokens = 0
        self._written = 0

    def add(self, part: EncodedPart, batch: TextBatch | TokenBatch, shard: str) -> None:
        count = len(part.lengths)
        if not count:
            return
        columns = [
            int64_column(np.arange(self._documents, self._documents + count)),
            text_column(batch.ids, part.places),
            text_column(batch.urls, part.places),
            pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(32), count, [None, pa.py_buffer(part.sha256)]
            ),
            int64_column(part.lengths),
            pa.DictionaryArray.from_arrays(
                pa.Array.from_buffers(pa.int32(), count, [None, pa.py_buffer(bytes(4 * count))]),
                pa.StringArray.from_buffers(
                    1,
                    pa.py_buffer(np.array([0, len(shard.encode())], dtype=np.int32)),
                    pa.py_buffer(shard.encode()),
                ),
            ),
            int64_column(line_numbers(batch.lines)[part.places]),
        ]
        self._pending.append(pa.table(columns, names=SCHEMA.names))
        self._documents += count
        self._tokens += len(part.tokens)
        while self._documents - self._written >= GROUP_DOCUMENTS:
            self._write_group()

    def finish(self) -> None:
        if self._pending:
            self._write_group()
        with self._named_errors():
            self._writer.add_key_value_metadata(
                {"tokens": str(self._tokens), METADATA_KEY: self._tokenizer_sha256}
            )
            self._writer.close()
            self._file.close()
            sync(self._path)

    def discard(self) -> None:
        # The file is removed below, so that errors while closing it do not matter.
        with contextlib.suppress(OSError, pa.ArrowException):
            self._writer.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)

    def _write_group(self) -> None:
        table = pa.concat_tables(self._pending)
        # One chunk, with only its own shards in the dictionary: the bytes of a group must not
        # depend on how documents came in batches.
        group = table[:GROUP_DOCUMENTS].unify_dictionaries().combine_chunks().cast(SCHEMA)
        with self._named_errors():
            self._writer.write_table(group, row_group_size=GROUP_DOCUMENTS)
        rest = table[GROUP_DOCUMENTS:]
        self._pending = [rest] if len(rest) else []
        self._written += len(table) - len(rest)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


class Provenance:
    """Open sidecar of a corpus, for questions; use it as a context manager or close it."""

    def __init__(self, path: Path, source: pa.NativeFile, file: pq.ParquetFile) -> None:
        """Take an open file; `open` is the way to get one."""
        self._path = path
        self._source = source
        self._file = file
        groups = range(file.metadata.num_row_groups)
        rows = [file.metadata.row_group(group).num_rows for group in groups]
        self._begins = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])

    @classmethod
    def open(cls, prefix: str | Path) -> Self:
        """Open PREFIX.docs.parquet.

        FileNotFoundError where there is none, saying how to get one; ValueError where the file is
        damaged, is not a sidecar, or belongs to another .bin and .idx.
        """
        path = sidecar_path(prefix)
        try:
            # Not memory-mapped: one pass would leave the whole file in this process's memory.
            source = pa.OSFile(str(path), "rb")
            file = pq.ParquetFile(source, page_checksum_verification=True)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path}: no such file: this corpus was made by another program or by an older"
                " version, which kept no record of where its documents came from; the same"
                " tools/preprocess_data.py command, run again, writes it"
            ) from None
        except (pa.ArrowException, OSError) as error:
            raise damaged_sidecar(path, str(error)) from error
        provenance = cls(path, source, file)
        try:
            provenance._check(prefix)
        except BaseException:
            provenance.close()
            raise
        return provenance

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._file.close()
        self._source.close()

    @property
    def num_documents(self) -> int:
        """Documents of the corpus."""
        return int(self._begins[-1])

    def mean_bytes(self, columns: Sequence[str]) -> float:
        """Return the bytes that these columns of a document take in memory, on average."""
        places = [SCHEMA.get_field_index(name) for name in columns]
        groups = range(self._file.metadata.num_row_groups)
        total = sum(
            self._file.metadata.row_group(group).column(place).total_uncompressed_size
            for group in groups
            for place in places
        )
        return total / max(1, self.num_documents)

    def documents(
        self, ordinals: NDArray[np.int64], columns: Sequence[str] = SCHEMA.names
    ) -> pa.Table:
        """Return columns of the documents [n], in this order, repeats included.

        Each row group that holds one of them is read once, and nothing else; of one that holds few
        of them, only their pages of SINGLE_PAGES. IndexError naming the first ordinal that is
        not in the corpus; ValueError where the file is damaged.
        """
        outside = ordinals[(ordinals < 0) | (ordinals >= self.num_documents)]
        if len(outside):
            raise IndexError(
                f"{self._path}: document {outside[0]} of {self.num_documents}; documents are"
                " numbered from 0"
            )
        wanted, places = np.unique(ordinals, return_inverse=True)
        # wanted[cuts[k]:cuts[k + 1]] lies in row group k.
        cuts = np.searchsorted(wanted, self._begins)
        names = list(dict.fromkeys(["ordinal", *columns]))
        groups = [
            (group, wanted[begin:end] - self._begins[group])
            for group, (begin, end) in enumerate(itertools.pairwise(cuts))
            if begin < end
        ]
        few = [each for each in groups if self._are_few(*each)]
        tables = self._read_few(few, names)
        tables |= {
            group: self._read(group, names).take(rows)
            for group, rows in groups
            if group not in tables
        }
        empty = SCHEMA.empty_table().select(names)
        table = pa.concat_tables([empty, *(tables[group] for group, _ in groups)])
        if not np.array_equal(table["ordinal"].to_numpy(), wanted):
            raise damaged_sidecar(self._path, "its rows are not in the order of the documents")
        table = table.unify_dictionaries().select(columns)
        return table if np.array_equal(wanted, ordinals) else table.take(places)

    def _are_few(self, group: int, rows: NDArray[np.int64]) -> bool:
        """Tell whether SINGLE_PAGES of these rows are to be read page by page."""
        chunks = self._file.metadata.row_group(group)
        return len(rows) <= FEW_DOCUMENTS and all(
            has_single_pages(chunks.column(SCHEMA.get_field_index(name))) for name in SINGLE_PAGES
        )

    def _read_few(
        self, groups: Sequence[tuple[int, NDArray[np.int64]]], names: list[str]
    ) -> dict[int, pa.Table]:
        """Return columns of the rows [n] of each of these row groups, of few rows each."""
        if not groups:
            return {}
        columns = {name: self._read_pages(name, groups) for name in names if name in SINGLE_PAGES}
        if others := [name for name in names if name not in SINGLE_PAGES]:
            rest = pa.concat_tables(self._read(group, others).take(rows) for group, rows in groups)
            columns |= {name: rest[name] for name in others}
        schema = pa.schema([SCHEMA.field(name) for name in names])
        table = pa.table([columns[name] for name in names], schema=schema)
        ends = itertools.accumulate(len(rows) for _, rows in groups)
        return {
            group: table.slice(end - len(rows), len(rows))
            for (group, rows), end in zip(groups, ends, strict=True)
        }

    def _read_pages(
        self, name: str, groups: Sequence[tuple[int, NDArray[np.int64]]]
    ) -> pa.ChunkedArray:
        place = SCHEMA.get_field_index(name)
        try:
            return read_values(self._path, self._file.metadata, place, groups)
        except (ValueError, pa.ArrowException, OSError) as error:
            raise damaged_sidecar(self._path, f"{name}: {error}") from error

    def find_id(self, document_id: str) -> NDArray[np.int64]:
        """Return the ordinals of all documents with this id, ascending."""
        return self._find("id", document_id)

    def find_sha256(self, sha256: str) -> NDArray[np.int64]:
        """Return the ordinals of all documents whose text has this SHA-256, ascending.

        ValueError where that is not 64 hexadecimal digits.
        """
        return self._find("sha256", as_digest(sha256))

    def find_text(self, text: str) -> NDArray[np.int64]:
        """Return the ordinals of all documents with exactly this text, ascending."""
        return self.find_sha256(hashlib.sha256(text.encode()).hexdigest())

    def _check(self, prefix: str | Path) -> None:
        """Refuse a file of another kind, or of a pair whose sizes are not those of this one."""
        if not self._file.schema_arrow.equals(SCHEMA, check_metadata=True):
            raise damaged_sidecar(self._path, f"not the columns of {FORMAT}")
        tokens = int(self._file.metadata.metadata[b"tokens"])
        sizes = [os.stat(f"{prefix}{suffix}").st_size for suffix in (".idx", ".bin")]
        idx_bytes = INDEX_BYTES + INDEX_BYTES_PER_DOCUMENT * self.num_documents
        if sizes not in ([idx_bytes, 2 * tokens], [idx_bytes, 4 * tokens]):
            raise ValueError(
                f"{self._path}: is about {self.num_documents} documents and {tokens} tokens, and"
                f" {prefix}.idx and .bin ({sizes[0]} and {sizes[1]} bytes) hold others: another"
                " program has replaced them; run tools/preprocess_data.py again"
            )

    def _find(self, column: str, value: str | bytes) -> NDArray[np.int64]:
        (groups,) = groups_that_may_hold([self._path], column, value)
        return self.find_in(groups, column, value)

    def find_in(self, groups: Sequence[int], column: str, value: str | bytes) -> NDArray[np.int64]:
        """Return the ordinals of the documents of some row groups whose column has this value."""
        wanted = pa.scalar(value, SCHEMA.field(column).type)
        ordinals = [np.empty(0, dtype=np.int64)]
        for group in groups:
            equal = pc.equal(self._read(group, [column])[column], wanted)
            ordinals.append(self._begins[group] + np.flatnonzero(equal.fill_null(False)))
        return np.concatenate(ordinals)

    def _read(self, group: int, columns: list[str] | None) -> pa.Table:
        try:
            return self._file.read_row_group(group, columns)
        except (pa.ArrowException, OSError) as error:
            raise damaged_sidecar(self._path, f"row group {group}: {error}") from error


def as_digest(sha256: str) -> bytes:
    """Return the 32 bytes of a SHA-256; ValueError where it is not 64 hexadecimal digits."""
    if not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"{sha256!r}: not a SHA-256, which has 64 hexadecimal digits")
    return bytes.fromhex(sha256)
