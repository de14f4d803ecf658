"""Show the training losses of each source and phase over tokens, or of the rows of a document."""

from __future__ import annotations

import argparse
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.order.blend import rows_by_source
from megatron_ettin.queries.answer import add_shared_arguments, show
from megatron_ettin.queries.documents import (
    Document,
    DocumentName,
    DocumentOrigin,
    Sidecars,
    add_document_arguments,
    document_name,
    find_documents,
    select_sources,
)
from megatron_ettin.queries.recorded_run import RecordedRun, open_run
from megatron_ettin.queries.run_losses import CHUNK_ROWS, SHORTEST_ROWS, RunLosses
from megatron_ettin.queries.where import list_places

#: Points of a curve in a phase, at most.
MOST_POINTS = 100


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """Mean loss of a source over rows [g_begin, g_end) of a phase."""

    phase: str
    source: str
    g_begin: int
    g_end: int
    run_tokens: int
    """Tokens that the run had consumed in the middle of these rows."""
    rows: int
    """Rows of the source with a loss."""
    loss: float
    """Mean over their tokens, as the training loss is."""


@dataclass(frozen=True, kw_only=True)
class LossCurves:
    """Losses by source over the rows of a run."""

    run: str
    g_begin: int
    g_end: int
    """First row after those with a loss on record."""
    figure: str | None
    points: list[LossPoint]


@dataclass(frozen=True, kw_only=True)
class LossOfRow:
    """Loss of a row that holds a part of a document."""

    g: int
    step: int | None
    epoch: int
    offset: int
    length: int
    """Tokens of the document in the row."""
    loss: float | None
    """Mean loss of the whole row; None if it was left out, is to come, or is not on record."""
    typical: float | None
    """Median loss of the rows that it is compared with (`spikes`)."""
    z: float | None


@dataclass(frozen=True, kw_only=True)
class LossesOfDocument:
    """Losses of the rows that hold parts of a document."""

    source: str
    ordinal: int
    id: str | None
    url: str | None
    places: list[LossOfRow]


@dataclass(frozen=True, kw_only=True)
class DocumentLosses:
    """Losses of all documents that the name matches."""

    run: str
    documents: list[LossesOfDocument]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add_shared_arguments(parser, "losses --run runs/encoder --figure losses.png")
    add_document_arguments(parser, required=False)
    add("--from", dest="begin", default="0", metavar="CKPT", help="rows after this checkpoint")
    add("--to", dest="end", metavar="CKPT", help="rows up to this one; default: the last step")
    add("--figure", type=Path, metavar="PNG", help="draw the losses of the sources over tokens")


def print_answer(args: argparse.Namespace) -> int:
    """Print the answer; return 0."""
    run, name = open_run(args.run), document_name(args)
    begin = run.checkpoint(args.begin).g
    end = run.checkpoint(args.end).g if args.end is not None else None
    if name.is_given:
        return show(find_document_losses(run, name, begin, end), args)
    return show(find_curves(run, begin, end, source=args.source, figure=args.figure), args)


def find_curves(
    run: RecordedRun,
    begin: int = 0,
    end: int | None = None,
    *,
    source: str | None = None,
    figure: Path | None = None,
) -> LossCurves:
    """Return the losses of all sources, or of one, over the rows [begin, end).

    Raises:
        ValueError, OSError: the run keeps no losses, or their file is damaged or short.
    """
    losses = RunLosses(run)
    end = losses.end_g if end is None else min(end, losses.end_g)
    wanted = select_sources(run, source)
    points = [point for point in _points(losses, begin, end) if point.source in wanted]
    if figure is not None:
        from megatron_ettin.queries.losses_figure import write_figure

        write_figure(points, figure)
    return LossCurves(
        run=str(run.folder),
        g_begin=begin,
        g_end=end,
        figure=None if figure is None else str(figure),
        points=points,
    )


def _points(losses: RunLosses, begin: int, end: int) -> list[LossPoint]:
    points = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for index in range(len(losses.phases)):
            phase = losses.phases[index]
            first, last = max(begin, phase.start_g), min(end, phase.end_g)
            fewest = SHORTEST_ROWS * len(phase.pools)
            count = min(MOST_POINTS, max(1, (last - first) // fewest))
            cuts = [first + (last - first) * cut // count for cut in range(count + 1)]
            ranges = list(itertools.pairwise(cuts)) if last > first else []
            sums = threads.map(partial(_sums_by_source, losses, index), ranges)
            for (g_begin, g_end), (totals, tokens, rows) in zip(ranges, sums, strict=True):
                middle = _tokens_at(losses.run, (g_begin + g_end) // 2)
                points += [
                    LossPoint(
                        phase=phase.name,
                        source=pool.source,
                        g_begin=g_begin,
                        g_end=g_end,
                        run_tokens=middle,
                        rows=int(rows[k]),
                        loss=float(totals[k] / tokens[k]),
                    )
                    for k, pool in enumerate(phase.pools)
                    if tokens[k]
                ]
    return points


def _sums_by_source(
    losses: RunLosses, phase: int, rows: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the summed losses, tokens and rows with a loss of each source [sources]."""
    begin, end = rows
    # Sources repeat with the blend: rows are summed by their place in its period first.
    quotas, start = losses.quotas(phase), losses.phases[phase].start_g
    period = sum(quotas)
    sources = losses.sources(phase, np.arange(begin, begin + period))
    totals, tokens, without = np.zeros((3, period))
    for first in range(begin, end, CHUNK_ROWS):
        read = losses.reader.read(first, min(first + CHUNK_ROWS, end))
        _add_up(totals, read.sums if read.all_scored else np.nan_to_num(read.sums))
        _add_up(tokens, read.tokens)
        if not read.all_scored:
            _add_up(without, read.tokens == 0)
    by_source: list[NDArray[Any]] = [
        np.bincount(sources, place, len(quotas)) for place in (totals, tokens, without)
    ]
    rows_of_sources = rows_by_source(quotas, begin - start, end - start)
    return by_source[0], by_source[1], rows_of_sources - by_source[2]


def _add_up(totals: NDArray[np.float64], values: NDArray[Any]) -> None:
    """Add each of the values [n] to the total of its place in the period [period]."""
    for first in range(0, len(values), len(totals)):
        part = values[first : first + len(totals)]
        totals[: len(part)] += part


def _tokens_at(run: RecordedRun, g: int) -> int:
    """Return the tokens that the run had consumed before row `g`, within a step by its share."""
    ends, tokens = run.ledger.step_ends, run.ledger.cumulative("n_tokens")
    return round(float(np.interp(g, np.append(0, ends), np.append(0, tokens))))


def find_document_losses(
    run: RecordedRun, name: DocumentName, begin: int = 0, end: int | None = None
) -> DocumentLosses:
    """Return the losses of the rows of [begin, end) that hold parts of the documents of a name.

    Raises:
        ValueError, OSError: no such document, or the run keeps no losses.
    """
    losses, sidecars = RunLosses(run), Sidecars(run)
    documents = find_documents(run, name, sidecars)
    end = run.order.num_rows if end is None else end
    return DocumentLosses(
        run=str(run.folder),
        documents=[
            _of_document(losses, document, origin, begin, end)
            for document, origin in zip(documents, sidecars.origins(documents), strict=True)
        ],
    )


def _of_document(
    losses: RunLosses, document: Document, origin: DocumentOrigin, begin: int, end: int
) -> LossesOfDocument:
    places = [place for place in list_places(losses.run, document) if begin <= place.g < end]
    compared = losses.compare(np.array([place.g for place in places], dtype=np.int64))
    return LossesOfDocument(
        source=document.source,
        ordinal=document.ordinal,
        id=origin.id,
        url=origin.url,
        places=[
            LossOfRow(
                g=place.g,
                step=place.step,
                epoch=place.epoch,
                offset=place.offset,
                length=place.length,
                loss=_number(compared.means[index]),
                typical=_number(compared.middles[index]),
                z=_number(compared.z[index]),
            )
            for index, place in enumerate(places)
        ],
    )


def _number(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)
