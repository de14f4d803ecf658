"""Find the documents that contain a text, and every row, step and checkpoint that read it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.native import TextFinder
from megatron_ettin.queries.absence import reason_without_places
from megatron_ettin.queries.answer import add_shared_arguments, show
from megatron_ettin.queries.corpus_scan import CorpusScan, DocumentRange, add_scan_arguments
from megatron_ettin.queries.documents import Document, DocumentOrigin, Sidecars, select_sources
from megatron_ettin.queries.recorded_run import RecordedRun, open_run
from megatron_ettin.queries.where import Place, list_places

#: Documents that are listed unless --num says otherwise.
LISTED = 20
CUT = "no row holds the text whole: its documents' pieces cut it"


@dataclass(frozen=True, kw_only=True)
class TextPlace:
    """A row that holds the text."""

    g: int
    """Number of the row in the run, from 0."""
    step: int | None
    """None if the row is skipped."""
    slot: int | None
    """Number of the row in its step, from 0."""
    epoch: int
    occurrences: int
    """Occurrences that lie in this row from end to end."""
    status: str
    """"seen", "to come" or "skipped"."""
    checkpoint: str | None
    """First checkpoint whose weights were trained on the row; None if there is none yet."""


@dataclass(frozen=True, kw_only=True)
class FoundDocument:
    """A document that contains the text."""

    source: str
    ordinal: int
    tokens: int
    id: str | None
    url: str | None
    occurrences: int
    first_token: int
    """Token of the document in which the first occurrence begins, from 0."""
    reason: str | None
    """Reason why there are no places; None if there are."""
    places: list[TextPlace]


@dataclass(frozen=True, kw_only=True)
class Search:
    """Documents that contain a text."""

    run: str
    steps_done: int
    text: str
    """Text as the tokenizer spells it, which is what was looked for."""
    documents: int
    """Documents that contain it."""
    occurrences: int
    """Occurrences in these documents; overlapping ones count."""
    not_listed: int | None
    """Documents beyond those in `found`; None if all are there."""
    found: list[FoundDocument]
    """The first documents, by source and number."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add_shared_arguments(parser, 'search --run runs/encoder --text "the capital of France"')
    add("--text", required=True, metavar="TEXT", help="text to look for, letter by letter")
    number = f"documents to list (default {LISTED}); all are counted"
    add("--num", type=int, default=LISTED, metavar="N", help=number)
    add_scan_arguments(parser)


def print_answer(args: argparse.Namespace) -> int:
    """Print the answer; return 0."""
    run = open_run(args.run)
    sources = select_sources(run, args.source)
    scan = CorpusScan(run, sources, args.tokenizer)
    return show(search(run, scan, args.text, num=args.num), args)


def search(run: RecordedRun, scan: CorpusScan, text: str, *, num: int = LISTED) -> Search:
    """Return the documents that contain a text, the first `num` with their places.

    Raises:
        ValueError: the text is empty or was not UTF-8, `num` is negative, or a corpus has ids that
            its tokenizer has not.
    """
    if num < 0:
        raise ValueError(f"--num {num}: must be 0 or more")
    spelled = spelled_text(scan, text)
    finder = TextFinder(scan.vocabulary, spelled.encode(), scan.token_counts())
    documents = occurrences = 0
    listed: list[Document] = []
    for source, hits in hits_by_stretch(scan, finder):
        documents += len(hits)
        occurrences += int(hits[:, 1].sum())
        ordinals = hits[: num - len(listed), 0].tolist()
        listed += [Document(source, ordinal) for ordinal in ordinals]
    origins = Sidecars(run).origins(listed)
    return Search(
        run=str(run.folder),
        steps_done=run.steps_done,
        text=spelled,
        documents=documents,
        occurrences=occurrences,
        not_listed=documents - len(listed) or None,
        found=[_found(run, scan, finder, *each) for each in zip(listed, origins, strict=True)],
    )


def documents_that_contain(
    run: RecordedRun, sources: Sequence[str], text: str
) -> Iterator[Document]:
    """Yield the documents of some sources that contain a text; errors as of `search`."""
    scan = CorpusScan(run, sources)
    finder = TextFinder(scan.vocabulary, spelled_text(scan, text).encode(), scan.token_counts())
    for source, hits in hits_by_stretch(scan, finder):
        yield from (Document(source, ordinal) for ordinal in hits[:, 0].tolist())


def spelled_text(scan: CorpusScan, text: str) -> str:
    """Return a text as the tokenizer spells it; ValueError if there is nothing to look for."""
    if not text:
        raise ValueError("the text to look for is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text to look for: character {error.start} is not UTF-8") from None
    spelled = scan.spell(text)
    if not spelled:
        raise ValueError(f"{text!r}: nothing is left of it when the tokenizer has read it")
    return spelled


def hits_by_stretch(
    scan: CorpusScan, finder: TextFinder
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Yield a source and [m, 2] its next documents with the text, and occurrences in each."""
    for stretch in scan.stretches("searching"):
        with scan.reading(stretch) as read:
            hits = finder.find(read.corpus, read.begin, read.end)
        hits[:, 0] += read.offset
        yield stretch.source, hits


def _found(
    run: RecordedRun,
    scan: CorpusScan,
    finder: TextFinder,
    document: Document,
    origin: DocumentOrigin,
) -> FoundDocument:
    source, ordinal = document
    with scan.reading(DocumentRange(source, ordinal, ordinal + 1)) as read:
        ranges = finder.find_in(read.corpus, read.begin)
    ranges = scan.token_ranges(source, ordinal, ranges)
    places = list_places(run, document)
    holding = places_of_text(places, ranges)
    return FoundDocument(
        source=source,
        ordinal=ordinal,
        tokens=run.order.corpus(source).length(ordinal),
        id=origin.id,
        url=origin.url,
        occurrences=len(ranges),
        first_token=int(ranges[:, 0].min()),
        reason=None if holding else CUT if places else reason_without_places(run, document),
        places=holding,
    )


def places_of_text(places: Sequence[Place], ranges: NDArray[np.int64]) -> list[TextPlace]:
    """Return the places that hold at least one of the token ranges [m, 2] of their document."""
    holding = []
    for place in places:
        inside = holds(place, ranges)
        if inside.any():
            holding.append(
                TextPlace(
                    g=place.g,
                    step=place.step,
                    slot=place.slot,
                    epoch=place.epoch,
                    occurrences=int(inside.sum()),
                    status=place.status,
                    checkpoint=place.checkpoint,
                )
            )
    return holding


def holds(place: Place, ranges: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return [m]: whether each token range [m, 2] of the document lies in the place whole."""
    return (ranges[:, 0] >= place.offset) & (ranges[:, 1] <= place.offset + place.length)
