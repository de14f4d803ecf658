"""litData: StreamingDataset with TokensLoader, and the state of StreamingDataLoader.

A blend is a CombinedStreamingDataset with weights. litData reads rank and world size from the
environment (GLOBAL_RANK, WORLD_SIZE), which is set here while a rank's loader starts.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")  # it would ask the package index

from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset
from litdata.streaming import Cache, TokensLoader

from benchmarks.loaders.cases import RunSetting
from benchmarks.loaders.outcomes import DrawnSample
from benchmarks.loaders.rival import (
    PACKED_ROWS,
    PACKED_TOKENS,
    ROW_TOKENS,
    MadeUpText,
    Rival,
    RivalStream,
    RunPlan,
    identify,
)

CHUNK_ROWS = 6
CHUNK_TOKENS = 2**20


class LitData(Rival):
    """Chunks of tokens, StreamingDataset and StreamingDataLoader."""

    def write(self, path: Path, rows: NDArray[np.uint16]) -> None:
        """Write a folder of chunks."""
        write_chunks(path, rows, chunk_tokens=CHUNK_ROWS * ROW_TOKENS)

    def write_text(self, path: Path, text: MadeUpText) -> None:
        """Write chunks of the stream of documents, in the order of the corpus."""
        write_chunks(path, text.rows(), chunk_tokens=CHUNK_TOKENS)

    def packed_batches(self, path: Path) -> Iterator[Any]:
        """Yield batches of one epoch of the rows that the chunks are cut into."""
        dataset = StreamingDataset(
            str(path), item_loader=TokensLoader(block_size=PACKED_TOKENS), shuffle=True, seed=1
        )
        yield from StreamingDataLoader(dataset, batch_size=PACKED_ROWS, drop_last=True)

    def open(self, plan: RunPlan, state: Any | None) -> RivalStream:
        """Start a loader for each rank; each takes its own state, a new rank that of rank 0."""
        return _LitDataSteps(self.corpora(plan.sizes), plan, state)

    @staticmethod
    def versions() -> dict[str, str]:
        """Return the version of litData."""
        return {"litdata": version("litdata")}


class _LitDataSteps(RivalStream):
    def __init__(self, corpora: list[Path], plan: RunPlan, state: Any | None) -> None:
        self._setting = plan.present
        self._loaders = []
        for rank in range(plan.present.ranks):
            with _rank(rank, plan.present):
                loader = _loader(corpora, plan)
                if state is not None:
                    loader.load_state_dict(copy.deepcopy(state[rank if rank < len(state) else 0]))
                self._loaders.append(loader)
        self._batches = [_endless(loader) for loader in self._loaders]

    def step(self) -> list[DrawnSample]:
        samples: list[DrawnSample] = []
        for rank, batches in enumerate(self._batches):
            with _rank(rank, self._setting):
                samples += identify(next(batches))
        return samples

    def state(self) -> Any:
        return [copy.deepcopy(loader.state_dict()) for loader in self._loaders]


def _loader(corpora: list[Path], plan: RunPlan) -> Any:
    sources = [
        StreamingDataset(
            str(path),
            item_loader=TokensLoader(block_size=ROW_TOKENS),
            shuffle=True,
            drop_last=True,
            seed=plan.seed,
        )
        for path in corpora
    ]
    dataset: Any = sources[0]
    if len(sources) > 1:
        dataset = CombinedStreamingDataset(
            sources,
            seed=plan.seed,
            weights=[float(weight) for weight in plan.present.weights],
            iterate_over_all=False,
        )
    setting = plan.present
    return StreamingDataLoader(
        dataset, batch_size=setting.batch // setting.ranks, num_workers=0, drop_last=True
    )


def _endless(loader: Any) -> Iterator[Any]:
    """Yield batches, epoch after epoch; RuntimeError if an epoch has none."""
    while True:
        count = 0
        for batch in loader:
            count += 1
            yield batch
        # The rest of an epoch that was resumed may hold no whole batch.
        if not count and not loader.restore and loader.current_epoch > MAX_EMPTY_EPOCHS:
            raise RuntimeError("an epoch has no batch")


MAX_EMPTY_EPOCHS = 100


@contextmanager
def _rank(rank: int, setting: RunSetting) -> Iterator[None]:
    with patch.dict(os.environ, GLOBAL_RANK=str(rank), WORLD_SIZE=str(setting.ranks)):
        yield


def write_chunks(path: Path, rows: NDArray[np.uint16], *, chunk_tokens: int) -> None:
    """Write rows [n, tokens] as a folder of chunks for TokensLoader."""
    loader = TokensLoader(block_size=rows.shape[1])
    cache = Cache(str(path), chunk_size=chunk_tokens, item_loader=loader)
    for number, row in enumerate(torch.from_numpy(rows)):
        cache[number] = row
    cache.done()
    cache.merge()
