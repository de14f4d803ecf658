"""A loader under test, and the corpora that all of them read.

Sources of a case are taken from corpora that are written once for each format. A document has one
row's tokens, and each of them says which document it is, so a sample is known by what a loader
delivers. Nothing here imports this project's package, because the rivals run in an environment
of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.loaders.cases import SIZES, RunSetting
from benchmarks.loaders.outcomes import DrawnSample

ROW_TOKENS = 8
NUM_SOURCES = 3
FIRST_ID = 16
"""Ids below are special tokens."""
SOURCE_IDS = 1_000
"""Ids that each source has, of which a document takes one."""
VOCAB_SIZE = FIRST_ID + NUM_SOURCES * SOURCE_IDS


#: Batches for which costs are measured.
PACKED_TOKENS, PACKED_ROWS = 1024, 32
TEXT_VOCAB_SIZE = 50_368


@dataclass(frozen=True, kw_only=True)
class MadeUpText:
    """Documents end to end."""

    ids: NDArray[np.uint16]
    bounds: NDArray[np.int64]
    """[documents + 1] ends of the documents, from 0."""

    def rows(self) -> NDArray[np.uint16]:
        """Return the stream of all documents, cut into rows [n, PACKED_TOKENS]."""
        count = len(self.ids) // PACKED_TOKENS
        return self.ids[: count * PACKED_TOKENS].reshape(count, PACKED_TOKENS)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Settings of a run from its beginning: those that ended at a restart, then the present."""

    sizes: tuple[int, ...]
    seed: int
    present: RunSetting
    earlier: tuple[tuple[RunSetting, int], ...] = ()
    """Settings, and the number of samples after which they ended."""


class RivalStream(ABC):
    """A run in progress, all of its ranks in this process."""

    @abstractmethod
    def step(self) -> list[DrawnSample]:
        """Return the next step's samples, those of rank 0 first."""

    @abstractmethod
    def state(self) -> Any:
        """Return what a checkpoint would hold of the loader."""

    def close(self) -> None:  # noqa: B027 - most streams hold nothing
        """Release what the stream holds."""


class Rival(ABC):
    """A loader, in the mode that its documents recommend for resuming."""

    def __init__(self, folder: Path) -> None:
        """Take the folder of its corpora."""
        self.folder = folder

    def prepare(self) -> None:
        """Write the corpora that are missing."""
        for source in range(NUM_SOURCES):
            for size in SIZES:
                path = self.corpus(source, size)
                if not path.with_suffix(".done").exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self.write(path, documents(source, size))
                    path.with_suffix(".done").touch()

    def corpus(self, source: int, size: int) -> Path:
        """Return the place of a source's corpus of so many documents."""
        return self.folder / f"source{source}-{size}"

    def corpora(self, sizes: Sequence[int]) -> list[Path]:
        """Return the places of the sources of a case."""
        return [self.corpus(source, size) for source, size in enumerate(sizes)]

    @abstractmethod
    def write(self, path: Path, rows: NDArray[np.uint16]) -> None:
        """Write a corpus of documents [n, tokens] in the loader's own format."""

    @abstractmethod
    def open(self, plan: RunPlan, state: Any | None) -> RivalStream:
        """Start a run at its beginning, or at a state that was saved."""

    @abstractmethod
    def write_text(self, path: Path, text: MadeUpText) -> None:
        """Write documents of any length in the loader's own format, ready to be packed."""

    @abstractmethod
    def packed_batches(self, path: Path) -> Iterator[Any]:
        """Yield batches [PACKED_ROWS, PACKED_TOKENS] of one shuffled epoch of `write_text`'s."""

    @staticmethod
    @abstractmethod
    def versions() -> dict[str, str]:
        """Return the version of each package that decides the result."""


def documents(source: int, size: int) -> NDArray[np.uint16]:
    """Return the documents [size, ROW_TOKENS] of a source."""
    ids = FIRST_ID + source * SOURCE_IDS + np.arange(size, dtype=np.uint16)
    return np.repeat(ids[:, None], ROW_TOKENS, axis=1)


def identify(rows: Iterable[Any]) -> Iterator[DrawnSample]:
    """Yield which document each row is; ValueError if a row is not one whole document."""
    for row in rows:
        tokens = np.asarray(row)
        if tokens.shape != (ROW_TOKENS,) or (tokens != tokens[0]).any():
            raise ValueError(f"a row is not one document: {tokens.tolist()}")
        yield DrawnSample(*divmod(int(tokens[0]) - FIRST_ID, SOURCE_IDS))
