"""Grain: an iterator for each rank that mixes an iterator of each source.

Its state holds the place in each source, where that of ElasticIterator over a MapDataset holds one
number, so a change of the blend keeps the places. It is a state of one rank.
"""

from __future__ import annotations

from typing import Any

import grain

from benchmarks.loaders.grain_elastic import Grain, shuffled
from benchmarks.loaders.outcomes import Sample
from benchmarks.loaders.rival import Plan, Stream, identify


class GrainIterators(Grain):
    """ArrayRecord files, MapDatasets sliced by rank, `IterDataset.mix`."""

    def open(self, plan: Plan, state: Any | None) -> Stream:
        """Start an iterator for each rank; each takes its own state, a new rank that of rank 0."""
        sources, ranks = shuffled(self.corpora(plan.sizes), plan), plan.present.ranks
        by_rank = ([source[rank::ranks] for source in sources] for rank in range(ranks))
        return _Steps([_rank_iterator(of_rank, plan) for of_rank in by_rank], state)


class _Steps(Stream):
    def __init__(self, iterators: list[Any], states: list[Any] | None) -> None:
        self._iterators = iterators
        if states is not None:
            for rank, iterator in enumerate(iterators):
                iterator.set_state(states[rank if rank < len(states) else 0])

    def step(self) -> list[Sample]:
        return [sample for each in self._iterators for sample in identify(next(each))]

    def state(self) -> Any:
        return [iterator.get_state() for iterator in self._iterators]

    def close(self) -> None:
        for iterator in self._iterators:
            iterator.close()


def _rank_iterator(sources: list[Any], plan: Plan) -> Any:
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    parts = [source.to_iter_dataset(options) for source in sources]
    mixed = parts[0]
    if len(parts) > 1:
        mixed = grain.IterDataset.mix(parts, [float(weight) for weight in plan.present.weights])
    return iter(mixed.batch(plan.present.batch // plan.present.ranks, drop_remainder=True))
