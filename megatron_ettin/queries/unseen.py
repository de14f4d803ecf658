"""Draw a control group of documents that a checkpoint has not seen; each is equally likely.

The command walks a permutation of all documents, keyed by the seed. It passes over documents that
were seen or are too short to be trained on. So a larger N begins with the same documents.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_ettin import native
from megatron_ettin.queries.answer import add_shared_arguments, show
from megatron_ettin.queries.documents import Document, Sidecars, select_sources
from megatron_ettin.queries.recorded_run import CheckpointPoint, RecordedRun, open_run

CHUNK = 65_536


@dataclass(frozen=True, kw_only=True)
class UnseenDocument:
    """A drawn document."""

    source: str
    ordinal: int
    tokens: int
    id: str | None
    url: str | None


@dataclass(frozen=True, kw_only=True)
class Unseen:
    """Documents in the order of the draw."""

    run: str
    at: str
    step: int
    seed: int
    looked_at: int
    """Documents examined, including those that were seen or are too short."""
    documents: list[UnseenDocument]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add_shared_arguments(parser, "unseen --run runs/encoder --at step_00001000 --num 100 --seed 1")
    add("--at", required=True, metavar="CKPT", help="checkpoint, by name or step")
    add("--num", type=int, required=True, metavar="N", help="number of documents to draw")
    add(
        "--seed",
        type=int,
        required=True,
        metavar="S",
        help="seed of the draw; the same seed draws the same documents",
    )
    add("--source", metavar="NAME", help="draw only from this source")


def print_answer(args: argparse.Namespace) -> int:
    """Print the answer; return 0."""
    opened = open_run(args.run)
    at = opened.checkpoint(args.at)
    answer = draw_unseen(opened, at, num=args.num, seed=args.seed, source=args.source)
    return show(answer, args)


def draw_unseen(
    run: RecordedRun, at: CheckpointPoint, *, num: int, seed: int, source: str | None = None
) -> Unseen:
    """Draw `num` documents of which a checkpoint has seen no token; each is equally likely.

    Raises:
        ValueError: fewer documents are unseen; the message says how many.
    """
    if num < 1 or not 0 <= seed < 2**64:
        raise ValueError(f"num {num} must be positive, seed {seed} between 0 and 2^64 - 1")
    sources = select_sources(run, source)
    drawn: dict[Document, int] = {}
    looked_at = sum(run.order.corpus(name).num_documents for name in sources)
    with tqdm(total=num, desc="drawing", unit="doc", disable=None) as bar:
        for place, document, tokens in _shuffled(run, sources, seed, known_to_be_seen(run, at)):
            if tokens < run.order.shortest_document(document.source) or _was_seen(
                run, document, at
            ):
                continue
            drawn[document] = tokens
            bar.update()
            if len(drawn) == num:
                looked_at = place + 1
                break
    if len(drawn) < num:
        raise ValueError(
            f"{at.name} has seen all but {len(drawn)} of the {looked_at} documents of "
            f"{', '.join(sources)}, or they are too short to be trained on; --num {num} is too many"
        )
    origins = Sidecars(run).origins(list(drawn))
    return Unseen(
        run=str(run.folder),
        at=at.name,
        step=at.step,
        seed=seed,
        looked_at=looked_at,
        documents=[
            UnseenDocument(
                source=document.source,
                ordinal=document.ordinal,
                tokens=tokens,
                id=origin.id,
                url=origin.url,
            )
            for (document, tokens), origin in zip(drawn.items(), origins, strict=True)
        ],
    )


@dataclass(frozen=True)
class SeenByOrder:
    """Documents of a source that the order alone proves seen: their pool was drawn to its end."""

    ranges: list[tuple[int, int]]
    """Documents [first, end) of each such pool."""
    skipped: NDArray[np.int64]
    """Documents with a piece in a skipped row, ascending; these may be unseen after all."""

    def is_open(self, ordinals: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which documents [n] may still be unseen."""
        is_open = np.ones(len(ordinals), dtype=np.bool_)
        for first, end in self.ranges:
            is_open &= (ordinals < first) | (ordinals >= end)
        return is_open | np.isin(ordinals, self.skipped)

    def is_all_of(self, num_documents: int) -> bool:
        """Tell whether every document of the corpus is proven seen."""
        end = 0  # documents [0, end) are covered; ranges may overlap
        for first, stop in sorted(self.ranges):
            end = max(end, stop) if first <= end else end
        return end == num_documents and not len(self.skipped)


def known_to_be_seen(run: RecordedRun, at: CheckpointPoint) -> dict[str, SeenByOrder]:
    """Return, by source, the documents that the order proves seen; none for a run of Megatron.

    They include documents that a pool dropped, which no row shows; those are too short to be drawn.
    """
    order = run.order
    ranges: dict[str, list[tuple[int, int]]] = {}
    for pool, count in order.drawn_before(at.g):
        if count >= pool.rows:  # every row was drawn at least once, so every document that it keeps
            ranges.setdefault(pool.source, []).append((pool.first_document, pool.end_document))
    skipped: dict[int, list[NDArray[np.int64]]] = {}
    end = 0
    for begin, stop in run.done[: at.step].tolist() if ranges else ():
        if end < begin:  # rows [end, begin) between two steps were skipped
            pieces = order.pieces(end, begin)
            for number in np.unique(pieces.source).tolist():
                skipped.setdefault(number, []).append(pieces.document[pieces.source == number])
        end = stop
    nothing = np.empty(0, dtype=np.int64)
    return {
        name: SeenByOrder(
            ranges[name], np.unique(np.concatenate([nothing, *skipped.get(number, [])]))
        )
        for number, name in enumerate(order.source_names)
        if name in ranges
    }


def _shuffled(
    run: RecordedRun, sources: list[str], seed: int, seen: Mapping[str, SeenByOrder]
) -> Iterator[tuple[int, Document, int]]:
    """Yield (place in the permutation, document, its tokens) of documents that may be unseen."""
    corpora = [run.order.corpus(source) for source in sources]
    if all(
        name in seen and seen[name].is_all_of(corpus.num_documents)
        for name, corpus in zip(sources, corpora, strict=True)
    ):
        return
    counts = np.array([corpus.num_documents for corpus in corpora], dtype=np.int64)
    # The permutation numbers documents through all sources: source s has begins[s] to ends[s] - 1.
    ends = np.cumsum(counts)
    begins = ends - counts
    total = int(ends[-1])
    key = native.counter_key(seed, native.Purpose.UNSEEN, [])
    for begin in range(0, total, CHUNK):
        index = np.arange(begin, min(begin + CHUNK, total), dtype=np.int64)
        drawn = native.permute(total, key, index)
        source_index = np.searchsorted(ends, drawn, side="right")
        ordinals = drawn - begins[source_index]
        is_open = np.ones(len(drawn), dtype=np.bool_)
        for number, name in enumerate(sources):
            if name in seen:
                here = np.flatnonzero(source_index == number)
                is_open[here] = seen[name].is_open(ordinals[here])
        for place in np.flatnonzero(is_open).tolist():
            number, ordinal = int(source_index[place]), int(ordinals[place])
            tokens = corpora[number].length(ordinal)
            yield begin + place, Document(sources[number], ordinal), tokens


def _was_seen(run: RecordedRun, document: Document, at: CheckpointPoint) -> bool:
    rows = run.order.where(document.source, document.ordinal)
    before = rows[rows < at.g]
    return bool(len(before)) and bool(run.steps_of_rows(before).any())
