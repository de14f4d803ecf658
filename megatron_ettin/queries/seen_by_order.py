"""Documents that a run has seen for certain, because their pool was drawn to its end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.order import SampleOrder
from megatron_ettin.queries.recorded_run import CheckpointPoint, RecordedRun


@dataclass(frozen=True)
class SeenByOrder:
    """Documents of a source in pools whose rows were all drawn."""

    ranges: list[tuple[int, int]]
    """Documents [first, end) of such pools."""
    skipped: NDArray[np.int64]
    """Documents, ascending, that had a piece in a row that was left out."""

    def is_open(self, ordinals: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which documents [n] may still be unseen."""
        found = np.ones(len(ordinals), dtype=np.bool_)
        for first, end in self.ranges:
            found &= (ordinals < first) | (ordinals >= end)
        return found | np.isin(ordinals, self.skipped)

    def is_all_of(self, num_documents: int) -> bool:
        """Tell whether no document of the corpus can be unseen."""
        end = 0
        for first, stop in sorted(self.ranges):
            end = max(end, stop) if first <= end else end
        return end == num_documents and not len(self.skipped)


def known_to_be_seen(run: RecordedRun, at: CheckpointPoint) -> dict[str, SeenByOrder]:
    """Return by source what the order says without a look at documents; Megatron's says nothing.

    Documents that were dropped from a pool are among them: no row shows them.
    """
    order = run.order
    if not isinstance(order, SampleOrder):
        return {}
    ranges: dict[str, list[tuple[int, int]]] = {}
    for pool, count in order.drawn_before(at.g):
        if count >= pool.rows:
            ranges.setdefault(pool.source, []).append((pool.first_document, pool.end_document))
    skipped: dict[int, list[NDArray[np.int64]]] = {}
    end = 0
    for begin, stop in run.done[: at.step].tolist() if ranges else ():
        if end < begin:
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
