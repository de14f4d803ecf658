"""List the rows that a run left out, and why: by its configuration, or because a step went wrong.

The records of forks are there too: a run that goes back to a checkpoint takes its decision in
records that the return then moves to a fork.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.order.interventions import Intervention, SkipRecord, read_skips
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.answer import add_shared_arguments, show
from megatron_ettin.queries.recorded_run import RecordedRun, open_run


@dataclass(frozen=True, kw_only=True)
class SkippedStretch:
    """Rows [g_begin, g_end) of a SKIP record; the fields after `reason` are of interventions."""

    seq: int
    fork: str | None
    """Fork that holds the record; None: the ledger does, so the run went on without the rows."""
    after_step: int
    """Last step before the record."""
    phase: str
    g_begin: int
    g_end: int
    reason: str
    """`data.skip_rows`, or the setting that decided."""
    action: str | None
    """skip, or rewind: the run first went back to a checkpoint."""
    step: int | None
    """Number that the step would have had that went wrong."""
    loss: float | None
    """Loss of that step; None if it was not finite."""
    gradient_norm: float | None
    """Gradient norm of that step; None if it was not finite."""
    z: float | None
    """Robust z-score of that loss; None without a full window of losses."""


@dataclass(frozen=True, kw_only=True)
class SkippedPiece:
    """A piece of a document in a row that was left out; `offset` and `length` are in tokens."""

    g: int
    source: str
    document: int
    """Ordinal in the source's corpus, from 0."""
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Skips:
    """Everything that a run left out."""

    run: str
    skipped_rows: int
    """Rows that the run, without its forks, has left out so far."""
    interventions: int
    """Decisions that the run made by itself; a replay records one of them again."""
    skips: list[SkippedStretch]
    """Records of the ledger, then those of its forks."""
    pieces: list[SkippedPiece] | None = None
    """Content of the rows that the ledger leaves out; None if nobody asked."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_shared_arguments(parser, "skips --run runs/encoder --documents")
    told = "list what stands in the rows too, which needs the corpora"
    parser.add_argument("--documents", action="store_true", help=told)


def print_answer(args: argparse.Namespace) -> int:
    """Print the answer; return 0."""
    answer = list_skips(args.run)
    if args.documents:
        answer = dataclasses.replace(answer, pieces=list_pieces(open_run(args.run), answer.skips))
    return show(answer, args)


def list_skips(folder: Path) -> Skips:
    """Return what the run in `folder` left out.

    Raises:
        FileNotFoundError: it has no ledger.
        ValueError, OSError: its ledger or order.json is damaged or missing.
    """
    run = RunFolder(folder)
    run.read_ledger()
    phases = [phase.name for phase in run.read_order(check_ids=False).phases]
    records = read_skips(run.ledger)
    decided = [Intervention.from_payload(record.payload) for record in records]
    return Skips(
        run=str(folder),
        skipped_rows=sum(skip.g_end - skip.g_begin for skip in records if skip.fork is None),
        interventions=len({(each.rows, each.phase_id) for each in decided if each is not None}),
        skips=[
            _stretch(record, intervention, phases)
            for record, intervention in zip(records, decided, strict=True)
        ],
    )


def list_pieces(run: RecordedRun, skips: list[SkippedStretch]) -> list[SkippedPiece]:
    """Return the pieces of all rows that the ledger, without its forks, leaves out."""
    found: list[SkippedPiece] = []
    for skip in skips:
        if skip.fork is not None:
            continue
        pieces = run.order.pieces(skip.g_begin, skip.g_end)
        found += [
            SkippedPiece(
                g=int(pieces.g[index]),
                source=run.order.source_names[pieces.source[index]],
                document=int(pieces.document[index]),
                offset=int(pieces.offset[index]),
                length=int(pieces.length[index]),
            )
            for index in range(len(pieces.g))
        ]
    return found


def _stretch(
    record: SkipRecord, intervention: Intervention | None, phases: list[str]
) -> SkippedStretch:
    return SkippedStretch(
        seq=record.seq,
        fork=record.fork,
        after_step=record.step,
        # An order that was amended may have fewer phases than a fork.
        phase=phases[record.phase] if record.phase < len(phases) else str(record.phase),
        g_begin=record.g_begin,
        g_end=record.g_end,
        reason=str(record.payload.get("reason", "")),
        action=intervention.action if intervention else None,
        step=intervention.step if intervention else None,
        loss=intervention.loss if intervention else None,
        gradient_norm=intervention.gradient_norm if intervention else None,
        z=intervention.z if intervention else None,
    )
