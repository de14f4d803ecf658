"""Count what a run was trained on, by source and phase, in the layout of the EU's template.

The template is that of the Commission for the public summary of training content, Article 53(1)(d)
of Regulation (EU) 2024/1689 (docs/attestation.md).
"""

from __future__ import annotations

import argparse
import datetime
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.order import PoolSpec
from megatron_ettin.order.ledger import find_description
from megatron_ettin.publication import publish_text
from megatron_ettin.queries.answer import add_shared_arguments, show
from megatron_ettin.queries.recorded_run import CHUNK_ROWS, RecordedRun, open_run
from megatron_ettin.templates import template_environment

EXAMPLE = "training-content --run runs/encoder --output training_content.md"
#: Runs of at most this many rows are counted piece by piece; of more, partial epochs are estimated.
COUNTED_ROWS = 2**20
#: The template's ranges of the size of text, in tokens: upper end (exclusive), name.
SIZES = (
    (10**9, "Less than 1 billion tokens"),
    (10**13, "1 billion to 10 trillion tokens"),
    (None, "More than 10 trillion tokens"),
)


@dataclass(frozen=True, kw_only=True)
class SourceContent:
    """Content of one source in the rows of one phase."""

    phase: str
    source: str
    rows: int
    """Rows that were trained on."""
    tokens: int
    """Tokens of these rows: special tokens counted, padding not, a repetition again."""
    documents: int
    """Different documents of which at least a part was in these rows."""
    epochs: float
    """Rows of the source that the phase drew, divided by those of one epoch."""
    corpus_documents: int
    """Documents of the corpus that the phase could draw from."""
    corpus_tokens: int
    """Tokens of that corpus, without special tokens."""


@dataclass(frozen=True, kw_only=True)
class TrainingContent:
    """Content that a run was trained on so far."""

    run: str
    output: str
    order_id: str
    steps: int
    tokens: int
    """Tokens of all steps, as the ledger records them."""
    size: str
    """Range of the template that the tokens of all corpora lie in."""
    is_counted: bool
    """False if tokens and documents of a source are estimates; rows and epochs never are."""
    contents: list[SourceContent]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_shared_arguments(parser, EXAMPLE)
    output = "Markdown file to write, with the template's headings"
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=output)


def print_answer(args: argparse.Namespace) -> int:
    """Print the answer; return 0."""
    return show(write_training_content(open_run(args.run), args.output), args)


def write_training_content(run: RecordedRun, output: Path) -> TrainingContent:
    """Count what the steps that the run has taken held, and write the summary.

    Raises:
        NotRecordedError: Megatron trained the run.
        ValueError, OSError: a corpus or a plan cannot be read.
    """
    run.config_for("phases and sources")
    num_rows = int((run.done[:, 1] - run.done[:, 0]).sum())
    is_counted = num_rows <= COUNTED_ROWS
    contents = list(count_contents(run) if is_counted else estimate_contents(run))
    corpora = {(c.source, c.corpus_documents): c.corpus_tokens for c in contents}
    content = TrainingContent(
        run=str(run.folder),
        output=str(output),
        order_id=run.order.spec.order_id,
        steps=run.steps_done,
        tokens=int(run.ledger.steps["n_tokens"].sum()),
        size=_size(sum(corpora.values())),
        is_counted=is_counted,
        contents=contents,
    )
    environment = template_environment("queries", is_html=False)
    text = environment.get_template("training_content.md.j2").render(
        content=content,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        initialized_from=find_description(run.ledger.events).get("initialized_from"),
        corpora=corpora,
    )
    publish_text(output, text)
    return content


def count_contents(run: RecordedRun) -> Iterator[SourceContent]:
    """Count rows, tokens and documents by phase and source, piece by piece."""
    for index, phase in enumerate(run.order.spec.phases):
        rows: dict[str, int] = defaultdict(int)
        tokens: dict[str, int] = defaultdict(int)
        documents: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
        for begin, end in _trained_rows(run, phase.start_g, phase.end_g):
            pieces = run.order.pieces(begin, end)
            for number in np.unique(pieces.source).tolist():
                source, here = run.order.source_names[number], pieces.source == number
                rows[source] += len(np.unique(pieces.g[here]))
                tokens[source] += int(pieces.slots[here].sum())
                documents[source].append(np.unique(pieces.document[here]))
        for pool, drawn in _drawn_in_phase(run, index):
            seen = documents[pool.source]
            yield _content(
                pool,
                phase=phase.name,
                rows=rows[pool.source],
                tokens=tokens[pool.source],
                documents=len(np.unique(np.concatenate(seen))) if seen else 0,
                drawn=drawn,
            )


def estimate_contents(run: RecordedRun) -> Iterator[SourceContent]:
    """Estimate tokens and documents from the shares of each pool's rows that were drawn.

    Tokens of the sources of a phase add up to what the ledger records. A whole epoch gives all
    documents. Of a share f of an epoch, an uncut document was seen with probability f, and one that
    was cut, here into two, with 1 - (1 - f)^2.
    """
    steps = run.ledger.steps
    for index, phase in enumerate(run.order.spec.phases):
        here = steps[steps["phase"] == index]
        pools = list(_drawn_in_phase(run, index))
        expected = [drawn * pool.tokens / pool.rows for pool, drawn in pools]
        trained = int((here["g_end"] - here["g_begin"]).sum())
        total, rows = int(here["n_tokens"].sum()), sum(drawn for _, drawn in pools)
        plans = (plan for _, plan in run.order.plans(index))
        for (pool, drawn), tokens, plan in zip(pools, expected, plans, strict=False):
            share = min(1.0, drawn / pool.rows)
            uncut, cut = plan.num_documents - plan.cut_documents, plan.cut_documents
            yield _content(
                pool,
                phase=phase.name,
                rows=round(drawn * trained / rows) if rows else 0,
                tokens=round(tokens * total / sum(expected)) if total else 0,
                documents=round(uncut * share + cut * (1 - (1 - share) ** 2)),
                drawn=drawn,
            )


def _trained_rows(run: RecordedRun, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the rows of [begin, end) that steps have taken, in ranges of at most CHUNK_ROWS."""
    breaks = np.flatnonzero(run.done[1:, 0] != run.done[:-1, 1])
    firsts = run.done[np.concatenate([[0], breaks + 1]), 0] if len(run.done) else []
    lasts = run.done[np.concatenate([breaks, [-1]]), 1] if len(run.done) else []
    for first, last in zip(firsts, lasts, strict=True):
        first, last = max(int(first), begin), min(int(last), end)
        for chunk in range(first, last, CHUNK_ROWS):
            yield chunk, min(chunk + CHUNK_ROWS, last)


def _drawn_in_phase(run: RecordedRun, index: int) -> Iterator[tuple[PoolSpec, int]]:
    """Yield the pools of a phase that has begun, and the rows that it has drawn of each."""
    phases = run.order.spec.phases
    if phases[index].start_g >= run.end_g:
        return
    drawn = list(run.order.drawn_before(run.end_g))
    before = sum(len(phase.pools) for phase in phases[:index])
    for pool, count in drawn[before : before + len(phases[index].pools)]:
        yield pool, count - pool.drawn


def _content(
    pool: PoolSpec, *, phase: str, rows: int, tokens: int, documents: int, drawn: int
) -> SourceContent:
    return SourceContent(
        phase=phase,
        source=pool.source,
        rows=rows,
        tokens=tokens,
        documents=documents,
        epochs=drawn / pool.rows,
        corpus_documents=pool.documents_in_file,
        corpus_tokens=pool.tokens_in_file,
    )


def _size(tokens: int) -> str:
    return next(name for end, name in SIZES if end is None or tokens < end)
