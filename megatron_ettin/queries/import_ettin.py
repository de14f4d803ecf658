"""Make a corpus from a record in the layout of the published Ettin order: one document per row.

Documents keep the order of the record: folders of the first phase, then of ext, then of decay; in
each by checkpoint, file, step and row. PREFIX.steps.parquet holds the checkpoint and step of each
document.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_ettin.data.corpus_tokenizer import METADATA_KEY
from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.indexed import IndexedWriter, optimal_dtype
from megatron_ettin.publication import publish_text, publishing
from megatron_ettin.queries.answer import show

EXAMPLE = "--input exported --output corpora/published --tokenizer TOKENIZER"
_FOLDER = re.compile(r"(?:(?P<phase>ext|decay)_)?(?:checkpoint_)?(?P<number>\d+)")
_FILE = re.compile(r"steps_(?P<first>\d+)_to_(?P<last>\d+)\.parquet")
_PHASES = ("", "ext", "decay")
_ROWS = 4096
_SIDECAR = pa.schema(
    [
        ("ordinal", pa.int64()),
        ("folder", pa.dictionary(pa.int32(), pa.string())),
        ("checkpoint", pa.int64()),
        ("step", pa.int64()),
        ("file", pa.dictionary(pa.int32(), pa.string())),
        ("row", pa.int64()),
    ]
)
_YAML = """\
# {documents} rows of {folders} folders as documents. The record is exact between checkpoints only,
# and a run draws the documents in an order of its own: {sidecar} has the recorded one.
phases:
  - name: {name}
    train_tokens: {tokens}
    train_rows: {documents}
    seq_length: {longest}
    pack: none
    global_batch_size: ROWS
data:
  sources:
    {name}:
      prefix: {prefix}
      specials: present
  blend:
    {name}: {{{name}: 1.0}}
"""


@dataclass(frozen=True, kw_only=True)
class Import:
    """Summary of the corpus: PREFIX.bin, .idx, .steps.parquet and .yaml."""

    prefix: str
    folders: int
    files: int
    documents: int
    tokens: int
    longest: int
    """Tokens of the longest row: the smallest seq_length that cuts no row."""
    dtype: str


@dataclass(frozen=True, kw_only=True)
class RecordFile:
    """File of a record, and its place among the files."""

    path: Path
    phase: str
    checkpoint: int
    first: int
    last: int


def import_ettin(folder: Path, prefix: Path, *, tokenizer: Path | None = None) -> Import:
    """Write a record as a corpus whose documents include their special tokens.

    A tokenizer's vocabulary decides the dtype of the corpus, and ids beyond it are refused.

    Raises:
        FileNotFoundError: no record here.
        FileExistsError: the corpus exists already.
        ValueError: a file or row, which the message names, does not have the layout.
    """
    files = record_files(folder)
    if Path(f"{prefix}.idx").exists():
        raise FileExistsError(f"{prefix}.idx: exists already; name another --output")
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    vocab_size = None if loaded is None else loaded.ids.vocab_size
    dtype = _dtype(files, vocab_size)
    sidecar = Path(f"{prefix}.steps.parquet")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    longest = 0
    # The corpus is published last, so a .idx is proof that all files are complete.
    with (
        IndexedWriter(prefix, dtype) as corpus,
        publishing(sidecar) as temporary,
        pq.ParquetWriter(temporary, _SIDECAR, compression="zstd") as steps,
    ):
        for file in tqdm(files, desc="importing", unit="file", disable=None):
            for rows, step, flat, lengths in _read(file, vocab_size):
                steps.write_table(_steps_table(file, corpus.num_documents, rows, step))
                corpus.add_many(flat, lengths)
                longest = max(longest, int(lengths.max()))
        if loaded is not None:
            steps.add_key_value_metadata({METADATA_KEY: loaded.digest})
        documents, tokens = corpus.num_documents, corpus.num_tokens
    answer = Import(
        prefix=str(prefix),
        folders=len({file.path.parent for file in files}),
        files=len(files),
        documents=documents,
        tokens=tokens,
        longest=longest,
        dtype=dtype,
    )
    publish_text(Path(f"{prefix}.yaml"), _snippet(answer, sidecar))
    return answer


def _snippet(answer: Import, sidecar: Path) -> str:
    return _YAML.format(
        documents=answer.documents,
        folders=answer.folders,
        sidecar=sidecar.name,
        name=Path(answer.prefix).name,
        tokens=answer.tokens,
        longest=answer.longest,
        prefix=answer.prefix,
    )


def record_files(folder: Path) -> list[RecordFile]:
    """Return the files of a record, in the order of its rows.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a name does not have the layout, or two files hold the same step.
    """
    files = []
    for path in sorted(folder.glob("*/*.parquet")):
        place, steps = _FOLDER.fullmatch(path.parent.name), _FILE.fullmatch(path.name)
        if place is None or steps is None:
            raise ValueError(
                f"{path}: expected [ext_|decay_]checkpoint_NUMBER/steps_FIRST_to_LAST.parquet"
            )
        files.append(
            RecordFile(
                path=path,
                phase=place["phase"] or "",
                checkpoint=int(place["number"]),
                first=int(steps["first"]),
                last=int(steps["last"]),
            )
        )
    if not files:
        raise FileNotFoundError(f"{folder}: no folder with files steps_FIRST_to_LAST.parquet")
    files.sort(key=lambda file: (_PHASES.index(file.phase), file.checkpoint, file.first))
    for before, file in itertools.pairwise(files):
        if before.path.parent == file.path.parent and file.first <= before.last:
            raise ValueError(f"{file.path}: begins before {before.path} ends")
    return files


def _dtype(files: Sequence[RecordFile], vocab_size: int | None) -> str:
    """Check the columns of every file; return the dtype of the corpus."""
    widths = set()
    for file in files:
        try:
            schema = pq.read_schema(file.path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file.path}: no parquet file: {error}") from error
        for name in ("step", "input_ids"):
            if name not in schema.names:
                raise ValueError(f"{file.path}: has no column {name!r}, but {schema.names}")
        kind = schema.field("input_ids").type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not is_list or not pa.types.is_integer(kind.value_type):
            raise ValueError(f"{file.path}: input_ids are {kind}, not lists of integers")
        if not pa.types.is_integer(schema.field("step").type):
            raise ValueError(f"{file.path}: step is {schema.field('step').type}, not an integer")
        widths.add(kind.value_type.bit_width)
    if vocab_size is not None:
        return optimal_dtype(vocab_size)
    return "uint16" if max(widths) <= 16 else "int32"


def _read(
    file: RecordFile, vocab_size: int | None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Yield batches of rows, sorted by step.

    A batch is (number in the file [n], step [n], tokens end to end, tokens per row [n]).
    """
    with pq.ParquetFile(file.path) as content:
        steps = content.read(columns=["step"])["step"].combine_chunks()
        if steps.null_count:
            row = int(np.argmax(steps.is_null().to_numpy(zero_copy_only=False)))
            raise ValueError(f"{file.path}: row {row}: has no step")
        step = steps.to_numpy(zero_copy_only=False).astype(np.int64)
        outside = (step < file.first) | (step > file.last)
        if outside.any():
            row = int(np.argmax(outside))
            raise ValueError(
                f"{file.path}: row {row}: is of step {step[row]}, not of {file.first} to "
                f"{file.last} as the file's name says"
            )
        order = np.argsort(step, kind="stable")
        for rows, ids in _batches(content, order):
            flat, lengths = _flat(file, rows, ids, vocab_size)
            yield rows, step[rows], flat, lengths


def _batches(
    content: pq.ParquetFile, order: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], pa.Array]]:
    """Yield (rows, input_ids) in the given order; a file already in that order is streamed."""
    if (np.diff(order) == 1).all():
        begin = 0
        for batch in content.iter_batches(batch_size=_ROWS, columns=["input_ids"]):
            yield order[begin : begin + len(batch)], batch.column(0)
            begin += len(batch)
        return
    whole = content.read(columns=["input_ids"])["input_ids"]
    for begin in range(0, len(order), _ROWS):
        rows = order[begin : begin + _ROWS]
        yield rows, whole.take(pa.array(rows)).combine_chunks()


def _flat(
    file: RecordFile, rows: NDArray[np.int64], ids: Any, vocab_size: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths = ids.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    if not lengths.all():
        raise ValueError(f"{file.path}: row {rows[np.argmin(lengths)]}: has no input_ids")
    values = ids.flatten()
    # Without a tokenizer, ids must fit into the int32 of a corpus.
    limit = 2**31 if vocab_size is None else vocab_size
    if values.null_count:
        wrong = values.is_null().to_numpy(zero_copy_only=False)
        flat = np.zeros(len(values), dtype=np.int64)
    else:
        flat = values.to_numpy(zero_copy_only=False).astype(np.int64)
        wrong = (flat < 0) | (flat >= limit)
    if wrong.any():
        at = int(np.argmax(wrong))
        row = rows[np.searchsorted(np.cumsum(lengths), at, side="right")]
        raise ValueError(
            f"{file.path}: row {row}: input_ids hold {values[at].as_py()}; ids are 0 to {limit - 1}"
        )
    return flat, lengths


def _steps_table(
    file: RecordFile, first: int, rows: NDArray[np.int64], step: NDArray[np.int64]
) -> pa.Table:
    def constant(text: str) -> pa.Array:
        return pa.DictionaryArray.from_arrays(np.zeros(len(rows), dtype=np.int32), [text])

    return pa.Table.from_arrays(
        [
            pa.array(np.arange(first, first + len(rows), dtype=np.int64)),
            constant(file.path.parent.name),
            pa.array(np.full(len(rows), file.checkpoint, dtype=np.int64)),
            pa.array(step),
            constant(file.path.name),
            pa.array(rows),
        ],
        schema=_SIDECAR,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.epilog = f"example: python tools/order.py import-ettin {EXAMPLE}"
    add = parser.add_argument
    add(
        "--input",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the record; its folders hold the parquet files",
    )
    add(
        "--output",
        type=Path,
        required=True,
        metavar="PREFIX",
        help="path of the corpus, without .bin and .idx",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="tokenizer whose vocabulary bounds the ids and sets the dtype",
    )
    add("--json", action="store_true", help="print one JSON object")


def print_answer(args: argparse.Namespace) -> int:
    """Write the corpus and print its summary; return 0."""
    return show(import_ettin(args.input, args.output, tokenizer=args.tokenizer), args)
