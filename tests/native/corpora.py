"""Corpora and plans for tests, written to a folder. The .bin files are holes: all tokens are 0."""

import struct
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ettin import native
from tests.native import reference

SEED = 77
#: Slots and segments of the short rows.
SEQ_LENGTH, SEGMENTS = 24, 3

Lengths = Sequence[int] | NDArray[np.int32] | NDArray[np.int64]


def write_lengths(prefix: Path, lengths: Lengths) -> native.TokenFile:
    """Write a pair of documents of one sequence each, with the given lengths."""
    values = np.asarray(lengths, np.int64)
    count = len(values)
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, count, count + 1))
        file.write(values.astype("<i4").tobytes())
        file.write((2 * (np.cumsum(values) - values)).astype("<i8").tobytes())
        file.write(np.arange(count + 1, dtype="<i8").tobytes())
    write_hole(Path(f"{prefix}.bin"), 2 * int(values.sum()))
    return native.TokenFile(prefix)


def write_hole(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def build_plan(
    file: native.TokenFile,
    path: Path,
    seq_length: int,
    *,
    first: int = 0,
    end: int | None = None,
    pack: str = "bfd",
    specials: str = "add",
    min_doc_tokens: int = 1,
    max_segments: int | None = None,
    block: int = 65_536,
    bodies: bool = True,
    threads: int = 1,
) -> native.RowPlan:
    native.build_row_plan(
        file,
        path,
        first_document=first,
        end_document=file.num_documents if end is None else end,
        seq_length=seq_length,
        pack=pack,
        specials=specials,
        min_doc_tokens=min_doc_tokens,
        max_segments_per_row=max_segments or (max(1, seq_length // 16) if pack == "bfd" else 1),
        block_documents=block,
        bodies=bodies,
        threads=threads,
    )
    return native.RowPlan(path, file)


def plan_lengths(folder: Path, lengths: Lengths, seq_length: int, **rules: Any) -> native.RowPlan:
    """Plan documents of the given lengths by build_plan(), in files of new names in the folder."""
    prefix = folder / f"corpus{len(list(folder.iterdir()))}"
    return build_plan(write_lengths(prefix, lengths), Path(f"{prefix}.plan"), seq_length, **rules)


def plan_briefly(lengths: Lengths, seq_length: int, **rules: Any) -> native.RowPlan:
    """Plan documents as plan_lengths() does; the names of the files are gone afterwards."""
    with TemporaryDirectory() as folder:
        return plan_lengths(Path(folder), lengths, seq_length, **rules)


def plan_short_rows(lengths: list[int], specials: str, pack: str = "bfd") -> native.RowPlan:
    """Plan rows of SEQ_LENGTH slots with at most SEGMENTS segments, one where it is not bfd."""
    segments = SEGMENTS if pack == "bfd" else 1
    return plan_briefly(lengths, SEQ_LENGTH, pack=pack, specials=specials, max_segments=segments)


def make_order(sources: list[reference.Source]) -> native.PhaseOrder:
    """Return the order of a phase with the seed SEED."""
    return native.PhaseOrder(
        seed=SEED,
        source_ids=[source.id for source in sources],
        quotas=[source.quota for source in sources],
        rows=[source.rows for source in sources],
        drawn=[source.drawn for source in sources],
    )


def pieces_of(plan: native.RowPlan) -> list[list[reference.Piece]]:
    listed = plan.pieces(np.arange(plan.num_rows))
    pieces = [
        reference.Piece(*piece)
        for piece in zip(*(column.tolist() for column in piece_columns(listed)), strict=True)
    ]
    return [pieces[begin:end] for begin, end in pairwise(listed.splits)]


def piece_columns(pieces: native.RowPieces) -> list[NDArray[Any]]:
    """Return the fields of pieces in the order of `reference.Piece`."""
    return [getattr(pieces, field.name) for field in fields(reference.Piece)]


def assert_equal_pieces(ours: native.RowPieces, theirs: native.RowPieces) -> None:
    for ours_column, theirs_column in zip(
        [ours.splits, *piece_columns(ours)], [theirs.splits, *piece_columns(theirs)], strict=True
    ):
        np.testing.assert_array_equal(ours_column, theirs_column)
