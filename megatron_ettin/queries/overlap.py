"""Shares of benchmark items that documents hold, at each checkpoint of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.queries.contamination import NEVER, Contamination
from megatron_ettin.queries.recorded_run import CheckpointPoint, RecordedRun

#: Shares of an item's words above which it is counted apart: Llama 2's "not clean" and "dirty".
PARTLY, MOSTLY = 0.2, 0.8
IN_DOCUMENTS = "in documents"
LAST_STEP = "last step"


@dataclass(frozen=True, kw_only=True)
class CheckpointOverlap:
    """Overlap of all items with what was read by a checkpoint."""

    read_by: str
    step: int | None
    """None for all documents, read or not."""
    items: int
    """Items of which a sequence was read."""
    items_above_20_percent: int
    """Items of which more than 20 % of the words were read in sequences."""
    items_above_80_percent: int
    mean_overlap: float
    """Mean over all items of the share of words that were read in sequences."""


@dataclass(frozen=True, kw_only=True)
class Overlaps:
    """Overlap of each item, and how it grew."""

    points: list[CheckpointPoint]
    """Checkpoints, then the last step if it comes after them."""
    n: int
    words: NDArray[np.int64]
    """Words of each item [items]."""
    in_documents: NDArray[np.float64]
    """Share of its words in sequences that documents have [items]."""
    read_by: NDArray[np.float64]
    """The same for sequences that were read by each point [items, points]."""
    first_g: NDArray[np.int64]
    """First row that holds a sequence of each item whole; NEVER if there is none."""
    too_short: int
    """Items without a sequence."""

    @property
    def last(self) -> NDArray[np.float64]:
        """Overlap of each item [items] by the last point; 0 before the first step."""
        return self.read_by[:, -1] if self.points else np.zeros(len(self.words))

    @property
    def summary(self) -> str:
        """One line for people."""
        total, documents = len(self.words), int((self.in_documents > 0).sum())
        read = int((self.last > 0).sum())
        mostly = int((self.last > MOSTLY).sum())
        by = f"by step {self.points[-1].step}" if self.points else "before the first step"
        return (
            f"{documents} of {total} items share {self.n} words with a document; the run had read "
            f"{read} of them {by}, {mostly} almost whole (more than {MOSTLY:.0%} of the words)"
        )

    def checkpoints(self) -> list[CheckpointOverlap]:
        """Return the table over checkpoints; its first line is about all documents."""
        columns: list[tuple[str, int | None, NDArray[np.float64]]] = [
            (IN_DOCUMENTS, None, self.in_documents)
        ]
        columns += [
            (point.name, point.step, self.read_by[:, place])
            for place, point in enumerate(self.points)
        ]
        return [
            CheckpointOverlap(
                read_by=name,
                step=step,
                items=int((shares > 0).sum()),
                items_above_20_percent=int((shares > PARTLY).sum()),
                items_above_80_percent=int((shares > MOSTLY).sum()),
                mean_overlap=float(shares.mean()),
            )
            for name, step, shares in columns
        ]


def measure_overlap(run: RecordedRun, found: Contamination) -> Overlaps:
    """Return the shares of each item after the pass over the corpora."""
    points = points_of(run)
    limits = np.array([point.g for point in points], dtype=np.int64)
    count = len(found.items)
    words = np.zeros(count, dtype=np.int64)
    in_documents, read_by = np.zeros(count), np.zeros((count, len(points)))
    first_g = np.full(count, NEVER, dtype=np.int64)
    too_short = 0
    for item, passages in enumerate(found.passages_of):
        words[item] = sum(len(found.finder.words(passage).split()) for passage in passages)
        too_short += not any(len(found.finder.grams(passage)) for passage in passages)
        if not found.documents[item]:
            continue
        covers = found.cover(item)
        in_documents[item] = sum(int(cover.in_document.sum()) for cover in covers) / words[item]
        rows = np.sort(np.concatenate([cover.first_g for cover in covers]))
        read_by[item] = np.searchsorted(rows, limits, side="left") / words[item]
        first_g[item] = rows[0]
    return Overlaps(
        points=points,
        n=found.n,
        words=words,
        in_documents=in_documents,
        read_by=read_by,
        first_g=first_g,
        too_short=too_short,
    )


def points_of(run: RecordedRun) -> list[CheckpointPoint]:
    """Return the checkpoints, and the last step if it comes after them."""
    points: Sequence[CheckpointPoint] = run.checkpoints
    if run.steps_done > max((point.step for point in points), default=0):
        points = [*points, CheckpointPoint(LAST_STEP, run.steps_done, run.end_g)]
    return list(points)
