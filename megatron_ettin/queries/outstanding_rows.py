"""Search for the rows whose loss is far above that of comparable rows: one pass over all losses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.order.blend import rows_by_source
from megatron_ettin.queries.run_losses import CHUNK_ROWS, LossStretch, RunLosses

#: Share by which a first test, in float32, is more generous than the exact one.
SLACK = np.float32(1e-5)
#: Loss that no row has: the limit of rows that are not judged. Infinity times no tokens is NaN.
UNREACHABLE = 1e25
#: Chunks that a thread searches at a time: one by one, handing them over took a fifth of the time.
TASK_CHUNKS = 64


@dataclass(frozen=True, kw_only=True)
class Outstanding:
    """Rows with a robust z-score of at least a limit."""

    count: int
    """All such rows."""
    unjudged: int
    """Rows of groups that have too few rows in a stretch, or losses without spread."""
    g: NDArray[np.int64]
    """[n] those with the highest scores, the highest first."""


def find_outstanding(losses: RunLosses, begin: int, end: int, *, z: float, num: int) -> Outstanding:
    """Return the rows of [begin, end) whose z-score is at least `z`, of which `num` are listed.

    Raises:
        RowLossError: the file of losses is damaged.
    """
    count = unjudged = 0
    highest = _Highest(num)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for stretch in losses.stretches(begin, end):
            first, last = max(begin, stretch.begin), min(end, stretch.end)
            unjudged += _count_unjudged(losses, stretch, first, last)
            chunks = [(at, min(at + CHUNK_ROWS, last)) for at in range(first, last, CHUNK_ROWS)]
            # Limits repeat with the blend, and a chunk holds whole periods of it.
            limits = _limits(losses, stretch, chunks[0], z)
            search = partial(_search, losses, stretch, limits, z, num)
            starts = range(0, len(chunks), TASK_CHUNKS)
            tasks = [chunks[start : start + TASK_CHUNKS] for start in starts]
            for found, of_task in threads.map(search, tasks):
                count += found
                highest.add(of_task.g, of_task.scores)
    return Outstanding(count=count, unjudged=unjudged, g=highest.g)


class _Highest:
    """Rows with the highest scores of all that were added, the highest first."""

    def __init__(self, num: int) -> None:
        self._num = num
        self.g = np.empty(0, dtype=np.int64)
        self.scores = np.empty(0)

    def add(self, g: NDArray[np.int64], scores: NDArray[np.float64]) -> None:
        """Add rows [n] with their scores [n]."""
        g, scores = np.append(self.g, g), np.append(self.scores, scores)
        highest = np.lexsort((g, -scores))[: self._num]
        self.g, self.scores = g[highest], scores[highest]


def _limits(
    losses: RunLosses, stretch: LossStretch, rows: tuple[int, int], z: float
) -> NDArray[np.float32]:
    """Return for each of the rows [n] the lowest loss that may have a z-score of `z`."""
    typical = losses.typical(stretch)
    of_groups = np.nan_to_num(typical.middles + z * typical.spreads, nan=UNREACHABLE)
    # One objective's limit may be below another's: the exact test tells them apart.
    of_sources = of_groups.reshape(-1, losses.num_objectives(stretch.phase)).min(axis=1)
    limits = of_sources.astype(np.float32) * (1 - SLACK)
    return limits[losses.sources(stretch.phase, np.arange(*rows))]


def _search(
    losses: RunLosses,
    stretch: LossStretch,
    limits: NDArray[np.float32],
    z: float,
    num: int,
    chunks: Sequence[tuple[int, int]],
) -> tuple[int, _Highest]:
    """Count the rows of chunks whose z-score is at least `z`; return `num` of them too."""
    count, highest = 0, _Highest(num)
    for begin, end in chunks:
        g, means = losses.reader.above(begin, end, limits[: end - begin])
        if len(g):
            scores = losses.typical(stretch).z(means, losses.groups(stretch.phase, g))
            is_far = scores >= z
            count += int(is_far.sum())
            highest.add(g[is_far], scores[is_far])
    return count, highest


def _count_unjudged(losses: RunLosses, stretch: LossStretch, first: int, last: int) -> int:
    """Count the rows [first, last) whose group has no typical loss; mixtures by their shares."""
    start = losses.phases[stretch.phase].start_g
    rows = rows_by_source(losses.quotas(stretch.phase), first - start, last - start)
    unknown = np.isnan(losses.typical(stretch).spreads)
    share = unknown.reshape(len(rows), -1).mean(axis=1)
    return round(float((rows * share).sum()))
