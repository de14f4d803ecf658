"""List every row, step and checkpoint at which a document was or will be seen."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_ettin.queries.absence import reason_without_places
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
from megatron_ettin.queries.recorded_run import RecordedRun, open_run


@dataclass(frozen=True, kw_only=True)
class Place:
    """A row that holds a piece of the document."""

    g: int
    """Number of the row in the run, from 0."""
    step: int | None
    """None if the row is skipped."""
    slot: int | None
    """Number of the row in its step, from 0."""
    epoch: int
    offset: int
    """First token of the document in this row."""
    length: int
    """Tokens of the document in this row."""
    status: Literal["seen", "to come", "skipped"]
    checkpoint: str | None
    """First checkpoint whose weights were trained on the row; None if there is none yet."""


@dataclass(frozen=True, kw_only=True)
class DocumentPlaces:
    """All places of a document."""

    source: str
    ordinal: int
    tokens: int
    id: str | None
    url: str | None
    reason: str | None
    """Reason why there are no places; None if there are."""
    places: list[Place]


@dataclass(frozen=True, kw_only=True)
class Where:
    """Places of all documents that the name matches."""

    run: str
    steps_done: int
    documents: list[DocumentPlaces]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_shared_arguments(parser, "where --run runs/encoder --doc web:1234")
    add_document_arguments(parser)


def print_answer(args: argparse.Namespace) -> int:
    """Print the answer; return 0."""
    return show(locate(open_run(args.run), document_name(args)), args)


def locate(run: RecordedRun, name: DocumentName) -> Where:
    """Return the places of all documents that a name matches.

    Raises:
        ValueError, OSError: no such document, or it cannot be looked up.
    """
    sidecars = Sidecars(run)
    documents = find_documents(run, name, sidecars)
    origins = sidecars.origins(documents)
    return Where(
        run=str(run.folder),
        steps_done=run.steps_done,
        documents=[_located(run, *each) for each in zip(documents, origins, strict=True)],
    )


def _located(run: RecordedRun, document: Document, origin: DocumentOrigin) -> DocumentPlaces:
    places = list_places(run, document)
    return DocumentPlaces(
        source=document.source,
        ordinal=document.ordinal,
        tokens=run.order.corpus(document.source).length(document.ordinal),
        id=origin.id,
        url=origin.url,
        reason=None if places else reason_without_places(run, document),
        places=places,
    )


def list_places(run: RecordedRun, document: Document) -> list[Place]:
    """Return the places of a document by ascending row; none if it is dropped or never drawn."""
    rows = run.order.where(document.source, document.ordinal)
    if not len(rows):
        return []
    source = run.order.source_names.index(document.source)
    places = []
    for g, step in zip(rows.tolist(), run.steps_of_rows(rows).tolist(), strict=True):
        pieces = run.order.pieces(g, g + 1)
        here = (pieces.source == source) & (pieces.document == document.ordinal)
        after = run.checkpoint_after(g) if step else None
        for piece in np.flatnonzero(here).tolist():
            places.append(
                Place(
                    g=g,
                    step=step or None,
                    slot=g - run.rows_of_step(step)[0] if step else None,
                    epoch=int(pieces.epoch[piece]),
                    offset=int(pieces.offset[piece]),
                    length=int(pieces.length[piece]),
                    status="skipped" if not step else "seen" if g < run.end_g else "to come",
                    checkpoint=after.name if after else None,
                )
            )
    return places
