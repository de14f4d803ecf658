"""Name the rows and documents whose loss stands out, and write the YAML that leaves them out.

A row's loss is compared with that of the rows of its source in the same stretch of its phase, by a
robust z-score: its distance from their median in robust standard deviations.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from megatron_ettin.publication import publish_text
from megatron_ettin.queries.answer import add_shared_arguments, show
from megatron_ettin.queries.documents import Document, DocumentOrigin, Sidecars
from megatron_ettin.queries.outstanding_rows import find_outstanding
from megatron_ettin.queries.recorded_run import RecordedRun, open_run
from megatron_ettin.queries.run_losses import RunLosses

#: Score from which a row stands out: one of 3.5 million normally distributed losses does.
DEFAULT_Z = 5.0
DEFAULT_NUM = 20


@dataclass(frozen=True, kw_only=True)
class SpikeRow:
    """A row whose loss stands out."""

    g: int
    step: int
    phase: str
    source: str
    epoch: int
    loss: float
    """Mean loss per token."""
    typical: float
    """Median loss of the rows that it is compared with."""
    z: float
    tokens: int
    """Tokens over which the loss is averaged."""


@dataclass(frozen=True, kw_only=True)
class SpikeDocument:
    """A piece of a document in such a row; `offset` and `length` are in tokens of the document."""

    g: int
    source: str
    ordinal: int
    offset: int
    length: int
    other_rows: int
    """Other rows with a part of the document that the run has trained on."""
    other_z: float | None
    """Median of their scores: high if the document stands out wherever it comes."""
    id: str | None
    url: str | None
    shard: str | None
    """Raw file."""
    line: int | None
    """Line of the raw file, or number of the record."""


@dataclass(frozen=True, kw_only=True)
class Spikes:
    """Rows that stand out, with what stands in them."""

    run: str
    g_begin: int
    g_end: int
    """First row after those that were looked at; later ones are not trained on, or have no loss."""
    z: float
    rows_above: int
    """Rows with at least this score; the highest are listed."""
    unjudged: int
    """Rows whose source has too few rows in a stretch to compare them with."""
    skip: str | None
    """YAML that leaves out the listed rows."""
    rows: list[SpikeRow]
    documents: list[SpikeDocument]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add_shared_arguments(parser, "spikes --run runs/encoder --num 5 --skip without_spikes.yaml")
    add("--from", dest="begin", default="0", metavar="CKPT", help="rows after this checkpoint")
    add("--to", dest="end", metavar="CKPT", help="rows up to this one; default: the last step")
    z = f"robust z-score from which a row stands out; default: {DEFAULT_Z:g}"
    add("--z", type=float, default=DEFAULT_Z, metavar="Z", help=z)
    num = f"rows to list, those with the highest scores; default: {DEFAULT_NUM}"
    add("--num", type=int, default=DEFAULT_NUM, metavar="N", help=num)
    skip = "write a YAML file for --config that leaves out the listed rows, and those of the run"
    add("--skip", type=Path, metavar="YAML", help=skip)


def print_answer(args: argparse.Namespace) -> int:
    """Print the answer; return 0."""
    run = open_run(args.run)
    begin = run.checkpoint(args.begin).g
    end = run.checkpoint(args.end).g if args.end is not None else None
    return show(find_spikes(run, begin, end, z=args.z, num=args.num, skip=args.skip), args)


def find_spikes(
    run: RecordedRun,
    begin: int = 0,
    end: int | None = None,
    *,
    z: float = DEFAULT_Z,
    num: int = DEFAULT_NUM,
    skip: Path | None = None,
) -> Spikes:
    """Return the rows of [begin, end) that stand out; all rows so far if `end` is None.

    Raises:
        ValueError, OSError: the run keeps no losses, or their file is damaged or short.
    """
    if z <= 0.0 or num < 1:
        raise ValueError(f"--z {z}, --num {num}: a score above 0 and a row at least")
    losses = RunLosses(run)
    end = losses.end_g if end is None else min(end, losses.end_g)
    found = find_outstanding(losses, begin, end, z=z, num=num)
    rows = _describe_rows(losses, found.g)
    if skip is not None:
        publish_text(skip, as_yaml(run, [row.g for row in rows], z=z))
    return Spikes(
        run=str(run.folder),
        g_begin=begin,
        g_end=end,
        z=z,
        rows_above=found.count,
        unjudged=found.unjudged,
        skip=None if skip is None else str(skip),
        rows=rows,
        documents=_describe_documents(losses, [row.g for row in rows]),
    )


def as_yaml(run: RecordedRun, rows: list[int], *, z: float) -> str:
    """Return the YAML that leaves out `rows`, and the rows that the run's configuration does."""
    configured = run.config_for("skipped rows").data.skip_rows
    ranges: list[list[int]] = []
    for first, end in sorted([*configured, *((g, g + 1) for g in rows)]):
        if ranges and first <= ranges[-1][1]:
            ranges[-1][1] = max(end, ranges[-1][1])
        else:
            ranges.append([first, end])
    head = (
        f"# {len(rows)} rows of {run.folder} with a robust z-score of {z:g} or more, and the "
        f"{len(configured)} ranges\n# that its configuration leaves out.\n"
    )
    return head + yaml.safe_dump({"data": {"skip_rows": ranges}}, default_flow_style=None)


def _describe_rows(losses: RunLosses, g: NDArray[np.int64]) -> list[SpikeRow]:
    run, ascending = losses.run, np.sort(g)
    compared = losses.compare(ascending)
    steps = run.steps_of_rows(ascending).tolist()
    described = {}
    for place, (row, step) in enumerate(zip(ascending.tolist(), steps, strict=True)):
        pieces = run.order.pieces(row, row + 1)
        described[row] = SpikeRow(
            g=row,
            step=step,
            phase=run.order.phase_at(row).name,
            source=run.order.source_names[pieces.source[0]],
            epoch=int(pieces.epoch[0]),
            loss=float(compared.means[place]),
            typical=float(compared.middles[place]),
            z=float(compared.z[place]),
            tokens=int(compared.tokens[place]),
        )
    return [described[row] for row in g.tolist()]


def _describe_documents(losses: RunLosses, rows: list[int]) -> list[SpikeDocument]:
    run, names = losses.run, losses.run.order.source_names
    found: list[tuple[Document, int, int, int]] = []
    for g in rows:
        pieces = run.order.pieces(g, g + 1)
        for index in range(len(pieces.g)):
            document = Document(names[pieces.source[index]], int(pieces.document[index]))
            found.append((document, g, int(pieces.offset[index]), int(pieces.length[index])))
    documents = [document for document, *_ in found]
    origins = Sidecars(run).origins(documents, DocumentOrigin._fields)
    described = []
    for (document, g, offset, length), origin in zip(found, origins, strict=True):
        elsewhere = _scores_elsewhere(losses, document, g)
        described.append(
            SpikeDocument(
                g=g,
                source=document.source,
                ordinal=document.ordinal,
                offset=offset,
                length=length,
                other_rows=len(elsewhere),
                other_z=float(np.median(elsewhere)) if len(elsewhere) else None,
                **origin._asdict(),
            )
        )
    return described


def _scores_elsewhere(losses: RunLosses, document: Document, g: int) -> NDArray[np.float64]:
    """Return the scores of the other rows with a part of a document; those without one are not."""
    rows = losses.run.order.where(*document)
    scores = losses.compare(rows[(rows < losses.end_g) & (rows != g)]).z
    return scores[~np.isnan(scores)]
