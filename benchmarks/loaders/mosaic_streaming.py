"""streaming-community, the maintained fork of mosaicml-streaming: StreamingDataset, MDS files.

Its documents promise the same order on another number of ranks (elastic determinism) if
`num_canonical_nodes` is fixed, and resume by `state_dict`. A real run has a process for each rank;
they share the work that the first of them computes. Here one process makes that array, by the call
that `StreamingDataset` itself makes, and reads the part of each rank.
"""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

if torch.version.cuda is None:
    # `streaming` imports torchvision, of which the package index has no build for torch without
    # CUDA: its operators do not load, and its import fails at those that it describes to torch.
    for name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming import Stream as MdsStream
from streaming.base.batching import generate_work
from streaming.base.world import World

from benchmarks.loaders.cases import RunSetting
from benchmarks.loaders.outcomes import DrawnSample
from benchmarks.loaders.rival import (
    PACKED_ROWS,
    MadeUpText,
    Rival,
    RivalStream,
    RunPlan,
    identify,
)

SHARD_ROWS = 6
SHARD_BYTES = 2**26


class Streaming(Rival):
    """MDS files and StreamingDataset with elastic determinism."""

    def write(self, path: Path, rows: NDArray[np.uint16]) -> None:
        """Write a folder of MDS shards."""
        write_shards(path, rows, shard_bytes=SHARD_ROWS * rows.shape[1] * 2 * 2)

    def write_text(self, path: Path, text: MadeUpText) -> None:
        """Write rows cut from the stream of documents, in the order of the corpus."""
        write_shards(path, text.rows(), shard_bytes=SHARD_BYTES)

    def packed_batches(self, path: Path) -> Iterator[Any]:
        """Yield batches of one epoch of the rows that were written."""
        dataset = StreamingDataset(
            local=str(path), batch_size=PACKED_ROWS, shuffle=True, num_canonical_nodes=1
        )
        loader = StreamingDataLoader(dataset, batch_size=PACKED_ROWS, drop_last=True)
        for batch in loader:
            yield batch["tokens"]

    def open(self, plan: RunPlan, state: Any | None) -> RivalStream:
        """Open the dataset, load the state, and share the epoch out to the ranks."""
        return _StreamingSteps(open_dataset(self.corpora(plan.sizes), plan), plan.present, state)

    @staticmethod
    def versions() -> dict[str, str]:
        """Return the version of the fork."""
        return {"streaming-community": version("streaming-community")}


class _StreamingSteps(RivalStream):
    def __init__(self, dataset: Any, setting: RunSetting, state: Any | None) -> None:
        self._dataset = dataset
        self._ranks = setting.ranks
        self._world = World(1, setting.ranks, 1, 0)
        dataset._parallel_rank_world = self._world
        if state is not None:
            dataset.load_state_dict(state)
        self._yielded = 0
        self._batches = self._endless()

    def step(self) -> list[DrawnSample]:
        return list(identify(next(self._batches)))

    def state(self) -> Any:
        # As StreamingDataLoader.state_dict: samples of this rank since the (re)start, times ranks.
        with patch("atexit.register"):  # see _endless
            return self._dataset.state_dict(self._yielded, False)

    def close(self) -> None:
        # The library does this when its process ends, and looks for free names one by one.
        dataset = self._dataset
        blocks = [
            dataset._locals_shm,
            dataset._shared_barrier._arr.shm,
            dataset._next_epoch.arr.shm,
            dataset._cache_usage.arr.shm,
            dataset._shard_states.shm,
            dataset._shard_access_times.shm,
        ]
        if hasattr(dataset, "_resume_shm"):
            blocks.append(dataset._resume_shm)
        for block in blocks:
            block.cleanup()
            atexit.unregister(block.cleanup)

    def _endless(self) -> Iterator[list[Any]]:
        dataset = self._dataset
        while True:
            # As StreamingDataset._resume_incr_epoch and _get_work, for all ranks at once.
            # It opens the saved state each time, and keeps it open until the process ends.
            with patch("atexit.register"):
                epoch, begin = dataset._resume(self._world, dataset.next_epoch)
            dataset.next_epoch = epoch + 1
            self._yielded = 0
            work = generate_work(dataset.batching_method, dataset, self._world, epoch, begin)
            (by_rank,) = work  # one node: [ranks, workers, batches, batch]
            for batch in range(by_rank.shape[2]):
                numbers = by_rank[:, 0, batch]
                self._yielded += numbers[0].size * self._ranks
                yield [dataset[int(number)]["tokens"] for number in numbers.flat if number >= 0]


def open_dataset(corpora: list[Path], plan: RunPlan) -> Any:
    """Return the dataset of a run; several sources are streams with proportions."""
    warnings.simplefilter("ignore")
    settings: dict[str, Any] = {
        "batch_size": plan.present.batch // plan.present.ranks,
        "shuffle": True,
        "shuffle_seed": plan.seed,
        "num_canonical_nodes": 1,
    }
    if len(corpora) == 1:
        return StreamingDataset(local=str(corpora[0]), **settings)
    streams = [
        MdsStream(local=str(path), proportion=weight / sum(plan.present.weights))
        for path, weight in zip(corpora, plan.present.weights, strict=True)
    ]
    return StreamingDataset(streams=streams, **settings)


def write_shards(path: Path, rows: NDArray[np.uint16], *, shard_bytes: int) -> None:
    """Write rows [n, tokens] as a folder of MDS shards."""
    with MDSWriter(
        out=str(path), columns={"tokens": "ndarray:uint16"}, size_limit=shard_bytes
    ) as writer:
        for row in rows:
            writer.write({"tokens": row})
