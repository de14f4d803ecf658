"""Grain: an iterator for each rank that mixes an iterator of each source.

Its state holds the place in each source, where that of ElasticIterator over a MapDataset holds one
number, so a change of the blend keeps the places. It is a state of one rank among so many: the
files of `grain.checkpoint.CheckpointHandler` are named `process_R-of-N.json`, and it refuses to
restore a rank that has none. `_GrainSteps` does the same.
"""

from __future__ import annotations

from typing import Any

import grain

from benchmarks.loaders.grain_elastic import Grain, shuffled
from benchmarks.loaders.outcomes import DrawnSample
from benchmarks.loaders.rival import RivalStream, RunPlan, identify


class GrainIterators(Grain):
    """ArrayRecord files, MapDatasets sliced by rank, `IterDataset.mix`."""

    def open(self, plan: RunPlan, state: Any | None) -> RivalStream:
        """Start an iterator for each rank; each takes its own state."""
        sources, ranks = shuffled(self.corpora(plan.sizes), plan), plan.present.ranks
        by_rank = ([source[rank::ranks] for source in sources] for rank in range(ranks))
        return _GrainSteps([_rank_iterator(of_rank, plan) for of_rank in by_rank], state)


class _GrainSteps(RivalStream):
    def __init__(self, iterators: list[Any], states: list[Any] | None) -> None:
        self._iterators = iterators
        if states is not None:
            if len(states) != len(iterators):
                raise ValueError(f"File process_0-of-{len(iterators)}.json does not exist.")
            for iterator, state in zip(iterators, states, strict=True):
                iterator.set_state(state)

    def step(self) -> list[DrawnSample]:
        return [sample for each in self._iterators for sample in identify(next(each))]

    def state(self) -> Any:
        return [iterator.get_state() for iterator in self._iterators]

    def close(self) -> None:
        for iterator in self._iterators:
            iterator.close()


def _rank_iterator(sources: list[Any], plan: RunPlan) -> Any:
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    parts = [source.to_iter_dataset(options) for source in sources]
    mixed = parts[0]
    if len(parts) > 1:
        mixed = grain.IterDataset.mix(parts, [float(weight) for weight in plan.present.weights])
    return iter(mixed.batch(plan.present.batch // plan.present.ranks, drop_remainder=True))
