"""Compare two runs: their orders, rows, batches, skipped rows and checkpoints."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_ettin.order.ledger import Ledger
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.answer import add_two_runs, show, two_runs
from megatron_ettin.queries.record import (
    Difference,
    digests_at,
    shared_boundaries,
    skipped_rows,
    spec_differences,
)
from megatron_ettin.queries.recorded_run import RecordedRun, open_run
from megatron_ettin.queries.verify_chain import require_sound

#: Rows compared at a time: by their pieces, and by their tokens, which take far more memory.
_ROWS, _ROWS_OF_TOKENS = 65_536, 512

EXAMPLE = "--run runs/first --run runs/second"


@dataclass(frozen=True, kw_only=True)
class PieceOfRow:
    """A piece that a run has in the first row that differs."""

    run: str
    source: str
    document: int
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class SharedCheckpoint:
    """Checkpoints of both runs after the same row; None if a run keeps no digests."""

    g: int
    first: str
    second: str
    same_order: bool | None
    same_tokens: bool | None


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Rows [begin, end) that only this run skipped."""

    run: str
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class ForkOfRun:
    """Steps that a run undid by going back to an earlier record; they are kept in a fork."""

    run: str
    to_record: int
    steps: int
    file: str


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Differences between two runs; rows g count from 0, steps from 1."""

    first: str
    second: str
    common_rows: int
    """Rows [0, common_rows) hold the same tokens of the same documents in both."""
    first_different_row: int | None
    """None if one order is the beginning of the other."""
    steps_in_both: int
    same_cuts: int
    """Steps among them that consume the same rows."""
    first_other_cut: int | None
    """First step that consumes other rows."""
    shared_boundaries: int
    """Rows at which a step ends in both."""
    first_disagreement: int | None
    """First such row at which the cumulative tokens or digests differ."""
    specs: list[Difference]
    row: list[PieceOfRow]
    """Pieces of `first_different_row` in each run."""
    checkpoints: list[SharedCheckpoint]
    skipped: list[Skipped]
    forks: list[ForkOfRun]
    notes: list[str]


def compare(first: Path, second: Path) -> Diff:
    """Compare two runs, of this project or of Megatron.

    Raises:
        ValueError, OSError: a file is missing or damaged, or a run's chain check fails; the message
            names the file or the first fault.
    """
    for folder in map(RunFolder, (first, second)):
        if folder.has_ledger():
            require_sound(folder.path)
        elif folder.order.is_file():
            folder.read_order()
    one, other = (open_run(folder, must_match=False) for folder in (first, second))
    common = common_rows(one, other)
    end = min(one.order.num_rows, other.order.num_rows)
    different = common if common < end else None
    steps = min(one.steps_done, other.steps_done)
    cuts = (one.done[:steps] == other.done[:steps]).all(axis=1)
    boundaries, disagreement = _boundaries(one, other)
    return Diff(
        first=str(first),
        second=str(second),
        common_rows=common,
        first_different_row=different,
        steps_in_both=steps,
        same_cuts=int(cuts.sum()),
        first_other_cut=None if cuts.all() else int(np.argmin(cuts)) + 1,
        shared_boundaries=boundaries,
        first_disagreement=disagreement,
        specs=spec_differences(one.recorded, other.recorded),
        row=[] if different is None else [*_row(one, different), *_row(other, different)],
        checkpoints=_checkpoints(one, other),
        skipped=_skipped(one, other),
        forks=[
            ForkOfRun(run=str(run.folder), to_record=f.parent_seq, steps=f.steps, file=f.file)
            for run in (one, other)
            for f in run.ledger.forks()
        ],
        notes=[
            f"{run.folder} is not as it was recorded any more: {change}"
            for run in (one, other)
            for change in run.changes
        ],
    )


def common_rows(one: RecordedRun, other: RecordedRun) -> int:
    """Return the number of first rows with the same tokens of the same documents in both orders.

    Equal phase ids and equal digests in both ledgers prove rows equal without a look at them. From
    there on, pieces are compared, and tokens too if the two runs' corpora differ.
    """
    begin = _known_to_be_common(one, other)
    end = min(one.order.num_rows, other.order.num_rows)
    with tqdm(
        total=end - begin, desc="comparing", unit="row", unit_scale=True, disable=None
    ) as bar:
        for first in range(begin, end, _ROWS):
            last = min(first + _ROWS, end)
            differing = _first_other_pieces(one, other, first, last)
            if not _same_corpora(one, other):
                # Tokens matter only up to the first row that differs by its pieces.
                differing = _first_other_tokens(one, other, first, differing)
            if differing < last:
                return differing
            bar.update(last - first)
    return end


def _known_to_be_common(one: RecordedRun, other: RecordedRun) -> int:
    """Return the number of first rows proven equal by phase ids, or by digests in both ledgers."""
    common = 0
    for first, second in zip(one.order.phases, other.order.phases, strict=False):
        # A run of Megatron has no phase id, and a path instead of a hash of its corpora.
        if first.phase_id is None or first.phase_id != second.phase_id:
            break
        common = min(first.end_g, second.end_g)
    if one.changes or other.changes:
        return common  # the ledgers describe files that have changed since
    shared = shared_boundaries(one.ledger, other.ledger)
    agree = shared.g[: len(shared.g) if shared.agree.all() else int(np.argmin(shared.agree))]
    for run in (one.ledger, other.ledger):  # no digest covers skipped rows
        skipped = skipped_rows(run, one.order.num_rows)
        agree = agree[agree <= skipped[0][0]] if skipped else agree
    return max(common, int(agree[-1]) if len(agree) else 0)


def _first_other_pieces(one: RecordedRun, other: RecordedRun, begin: int, end: int) -> int:
    """Return the first of the rows [begin, end) whose pieces differ; `end` if all are equal."""
    first, second = (run.order.pieces(begin, end) for run in (one, other))
    names = [
        np.array(run.order.source_names)[p.source] for run, p in ((one, first), (other, second))
    ]
    # Both tables are sorted by g, so the first unequal entry is in the first row that differs. If
    # one table continues where the other ends, its next row is that row.
    count = min(len(first.g), len(second.g))
    same = names[0][:count] == names[1][:count]
    for field in ("g", "document", "offset", "length", "slots"):
        same &= getattr(first, field)[:count] == getattr(second, field)[:count]
    rows = [
        pieces.g[count:] if same.all() else pieces.g[np.argmin(same) :]
        for pieces in (first, second)
    ]
    return min([end, *(int(g[0]) for g in rows if len(g))])


def _first_other_tokens(one: RecordedRun, other: RecordedRun, begin: int, end: int) -> int:
    """Return the first of the rows [begin, end) whose tokens differ; `end` if all are equal."""
    for first in range(begin, end, _ROWS_OF_TOKENS):
        last = min(first + _ROWS_OF_TOKENS, end)
        rows = zip(one.order.tokens(first, last), other.order.tokens(first, last), strict=True)
        for g, (tokens, others) in enumerate(rows, start=first):
            if not np.array_equal(tokens, others):
                return g
    return end


def _same_corpora(one: RecordedRun, other: RecordedRun) -> bool:
    """Tell whether all sources that both runs name have the same content, by hash or by path."""
    shared = set(one.order.source_names) & set(other.order.source_names)
    return all(one.order.content_id(name) == other.order.content_id(name) for name in shared)


def _boundaries(one: RecordedRun, other: RecordedRun) -> tuple[int, int | None]:
    """Count the rows at which a step ends in both; return also the first with other digests."""
    boundaries = np.intersect1d(one.done[:, 1], other.done[:, 1])
    shared = shared_boundaries(one.ledger, other.ledger)
    differing = np.flatnonzero(~shared.agree)
    return len(boundaries), int(shared.g[differing[0]]) if len(differing) else None


def _row(run: RecordedRun, g: int) -> list[PieceOfRow]:
    pieces = run.order.pieces(g, g + 1)
    return [
        PieceOfRow(
            run=str(run.folder),
            source=run.order.source_names[source],
            document=document,
            offset=offset,
            length=length,
        )
        for source, document, offset, length in zip(
            pieces.source.tolist(),
            pieces.document.tolist(),
            pieces.offset.tolist(),
            pieces.length.tolist(),
            strict=True,
        )
    ]


def _checkpoints(one: RecordedRun, other: RecordedRun) -> list[SharedCheckpoint]:
    by_row = {point.g: point.name for point in other.checkpoints}
    shared = []
    for point in one.checkpoints:
        if point.g not in by_row:
            continue
        same_order, same_tokens = _same_at(one.ledger, other.ledger, point.g)
        shared.append(
            SharedCheckpoint(
                g=point.g,
                first=point.name,
                second=by_row[point.g],
                same_order=same_order,
                same_tokens=same_tokens,
            )
        )
    return shared


def _same_at(first: Ledger, second: Ledger, g: int) -> tuple[bool | None, bool | None]:
    if not len(first.steps) or not len(second.steps):
        return None, None
    one, other = digests_at(first, g), digests_at(second, g)
    return (
        one["order_digest"] == other["order_digest"],
        one["token_digest"] == other["token_digest"],
    )


def _skipped(one: RecordedRun, other: RecordedRun) -> list[Skipped]:
    """Return the rows that only one run skipped, among those that both have reached."""
    end = min(run.end_g for run in (one, other))
    first, second = (set(skipped_rows(run.ledger, end)) for run in (one, other))
    return [
        Skipped(run=str(run.folder), begin=begin, end=stop)
        for run, ranges in ((one, first - second), (other, second - first))
        for begin, stop in sorted(ranges)
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_two_runs(parser, f"diff {EXAMPLE}")


def print_answer(args: argparse.Namespace) -> int:
    """Print the differences; return 0."""
    return show(compare(*two_runs(args)), args)
