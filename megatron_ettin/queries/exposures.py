"""Count how often a checkpoint has seen a document, and tell how long ago."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megatron_ettin.queries.answer import add_shared_arguments, show
from megatron_ettin.queries.documents import (
    Document,
    DocumentName,
    DocumentOrigin,
    Sidecars,
    add_document_arguments,
    document_name,
    find_documents,
)
from megatron_ettin.queries.recorded_run import CheckpointPoint, RecordedRun, open_run
from megatron_ettin.queries.where import list_places


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """Exposures of one document."""

    source: str
    ordinal: int
    id: str | None
    url: str | None
    tokens: int
    """Length of the document."""
    tokens_seen: int
    """Tokens of the document that were trained on, each time counted."""
    exposures: float | None
    """tokens_seen / tokens; None for an empty document."""
    first_step: int | None
    last_step: int | None
    steps_since_last: int | None
    """Steps up to the checkpoint since the last exposure; 0 if its last step saw the document."""
    tokens_since_last: int | None
    """Tokens of all documents in those steps."""
    next_step: int | None
    """First step after the checkpoint that sees the document; None if there is none."""


@dataclass(frozen=True, kw_only=True)
class Exposures:
    """Exposures of all documents that the name matches."""

    run: str
    at: str
    step: int
    g: int
    documents: list[Exposure]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_shared_arguments(parser, "exposures --run runs/encoder --doc web:1234 --at step_00001000")
    add_document_arguments(parser)
    at = "count up to this checkpoint, by name or step; default: up to the last step taken"
    parser.add_argument("--at", metavar="CKPT", help=at)


def print_answer(args: argparse.Namespace) -> int:
    """Print the answer; return 0."""
    opened = open_run(args.run)
    at = opened.checkpoint(args.at) if args.at is not None else None
    return show(count_exposures(opened, document_name(args), at), args)


def count_exposures(
    run: RecordedRun, name: DocumentName, at: CheckpointPoint | None = None
) -> Exposures:
    """Count the exposures of the documents of a name up to a checkpoint, or up to the last step.

    Raises:
        ValueError, OSError: no such document, or it cannot be looked up.
    """
    if at is None:
        at = CheckpointPoint("last step", run.steps_done, run.end_g)
    sidecars = Sidecars(run)
    documents = find_documents(run, name, sidecars)
    return Exposures(
        run=str(run.folder),
        at=at.name,
        step=at.step,
        g=at.g,
        documents=[
            _exposure(run, document, origin, at)
            for document, origin in zip(documents, sidecars.origins(documents), strict=True)
        ],
    )


def _exposure(
    run: RecordedRun, document: Document, origin: DocumentOrigin, at: CheckpointPoint
) -> Exposure:
    tokens = run.order.corpus(document.source).length(document.ordinal)
    trained = [place for place in list_places(run, document) if place.step is not None]
    before = [place for place in trained if place.g < at.g]
    tokens_seen = sum(place.length for place in before)
    steps = [place.step for place in before if place.step is not None]
    last = steps[-1] if steps else None
    return Exposure(
        source=document.source,
        ordinal=document.ordinal,
        id=origin.id,
        url=origin.url,
        tokens=tokens,
        tokens_seen=tokens_seen,
        exposures=tokens_seen / tokens if tokens else None,
        first_step=steps[0] if steps else None,
        last_step=last,
        steps_since_last=None if last is None else at.step - last,
        tokens_since_last=None
        if last is None
        else int(run.tokens_of_steps(last + 1, at.step).sum()),
        next_step=next((place.step for place in trained if place.g >= at.g), None),
    )
