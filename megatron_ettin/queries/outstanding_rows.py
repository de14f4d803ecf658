"""Search for the rows whose loss is far above that of comparable rows: one pass over all losses."""

from __future__ import annotations

import os
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
    g, scores = np.empty(0, dtype=np.int64), np.empty(0)
    count = unjudged = 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for stretch in losses.stretches(begin, end):
            first, last = max(begin, stretch.begin), min(end, stretch.end)
            unjudged += _count_unjudged(losses, stretch, first, last)
            chunks = [(at, min(at + CHUNK_ROWS, last)) for at in range(first, last, CHUNK_ROWS)]
            # Limits repeat with the blend, and a chunk holds whole periods of it.
            limits = _limits(losses, stretch, chunks[0], z)
            search = partial(_search, losses, stretch, limits, z)
            for found, found_scores in threads.map(search, chunks):
                count += len(found)
                g, scores = np.append(g, found), np.append(scores, found_scores)
                highest = np.lexsort((g, -scores))[:num]
                g, scores = g[highest], scores[highest]
    return Outstanding(count=count, unjudged=unjudged, g=g)


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
    rows: tuple[int, int],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the rows of a chunk whose z-score is at least `z`, and their scores."""
    read = losses.reader.read(*rows)
    near = np.flatnonzero(read.sums > read.tokens.astype(np.float32) * limits[: len(read.sums)])
    near = near[read.tokens[near] > 0]
    if not len(near):
        return near, np.empty(0)
    g = rows[0] + near
    means = read.sums[near].astype(np.float64) / read.tokens[near]
    scores = losses.typical(stretch).z(means, losses.groups(stretch.phase, g))
    is_far = scores >= z
    return g[is_far], scores[is_far]


def _count_unjudged(losses: RunLosses, stretch: LossStretch, first: int, last: int) -> int:
    """Count the rows [first, last) whose group has no typical loss; mixtures by their shares."""
    start = losses.phases[stretch.phase].start_g
    rows = rows_by_source(losses.quotas(stretch.phase), first - start, last - start)
    unknown = np.isnan(losses.typical(stretch).spreads)
    share = unknown.reshape(len(rows), -1).mean(axis=1)
    return round(float((rows * share).sum()))
