"""Grain: a mixed, shuffled and repeated MapDataset behind `grain.experimental.ElasticIterator`.

Grain's ordinary iterators have a state for each process. ElasticIterator is its iterator for a
number of processes that changes: it slices and batches itself, and the state of any process, one
global number, restores all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from numpy.typing import NDArray

from benchmarks.loaders.cases import RunSetting
from benchmarks.loaders.outcomes import DrawnSample
from benchmarks.loaders.rival import (
    PACKED_ROWS,
    PACKED_TOKENS,
    MadeUpText,
    Rival,
    RivalStream,
    RunPlan,
    identify,
)


class Grain(Rival):
    """ArrayRecord files, a MapDataset, ElasticIterator."""

    def write(self, path: Path, rows: NDArray[np.uint16]) -> None:
        """Write an ArrayRecord file, a document a record."""
        writer = ArrayRecordWriter(str(path.with_suffix(".array_record")), "group_size:1")
        for row in rows:
            writer.write(row.tobytes())
        writer.close()

    def write_text(self, path: Path, text: MadeUpText) -> None:
        """Write an ArrayRecord file, a document a record."""
        writer = ArrayRecordWriter(str(path.with_suffix(".array_record")), "group_size:1")
        for begin, end in itertools.pairwise(text.bounds):
            writer.write(text.ids[begin:end].tobytes())
        writer.close()

    def packed_batches(self, path: Path) -> Iterator[Any]:
        """Yield batches of one epoch, cut from the stream of shuffled documents."""
        source = grain.sources.ArrayRecordDataSource(str(path.with_suffix(".array_record")))
        documents = grain.MapDataset.source(source).seed(1).shuffle().map(_named)
        packed = grain.experimental.ConcatThenSplitIterDataset(
            documents.to_iter_dataset(), length_struct={"tokens": PACKED_TOKENS}
        )
        for batch in packed.batch(PACKED_ROWS, drop_remainder=True):
            yield batch["tokens"]

    def open(self, plan: RunPlan, state: Any | None) -> RivalStream:
        """Start an iterator for each rank; all of them take the state of rank 0."""
        return _ElasticSteps(mixture(self.corpora(plan.sizes), plan), plan.present, state)

    @staticmethod
    def versions() -> dict[str, str]:
        """Return the version of Grain."""
        return {"grain": version("grain")}


class _ElasticSteps(RivalStream):
    def __init__(self, dataset: Any, setting: RunSetting, state: Any | None) -> None:
        self._iterators = [
            iter(
                grain.experimental.ElasticIterator(
                    dataset,
                    global_batch_size=setting.batch,
                    shard_options=grain.sharding.ShardOptions(rank, setting.ranks),
                    read_options=grain.ReadOptions(num_threads=0, prefetch_buffer_size=0),
                )
            )
            for rank in range(setting.ranks)
        ]
        for iterator in self._iterators if state is not None else ():
            iterator.set_state(state)

    def step(self) -> list[DrawnSample]:
        return [sample for each in self._iterators for sample in identify(next(each))]

    def state(self) -> Any:
        return self._iterators[0].get_state()

    def close(self) -> None:
        for iterator in self._iterators:
            iterator.close()


def mixture(corpora: list[Path], plan: RunPlan) -> Any:
    """Return the endless dataset of a run."""
    sources = shuffled(corpora, plan)
    if len(sources) == 1:
        return sources[0]
    return grain.MapDataset.mix(sources, [float(weight) for weight in plan.present.weights])


def shuffled(corpora: list[Path], plan: RunPlan) -> list[Any]:
    """Return each source without end, shuffled anew in each epoch."""
    return [
        grain.MapDataset.source(
            grain.sources.ArrayRecordDataSource(str(path.with_suffix(".array_record")))
        )
        .map(_decode)
        .seed(plan.seed + number)
        .shuffle()
        .repeat()
        for number, path in enumerate(corpora)
    ]


def _decode(record: bytes) -> NDArray[np.uint16]:
    return np.frombuffer(record, dtype=np.uint16)


def _named(record: bytes) -> dict[str, NDArray[np.uint16]]:
    return {"tokens": _decode(record)}
