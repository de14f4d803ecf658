"""Contents of single raw records, found again by file and line."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.data.raw_files import RawFile, TextBatch, read_batches

RecordContent = str | NDArray[np.integer]
"""Text of a record, or its token ids [n] where the raw file holds these."""


def contents_at(
    path: Path, lines: Collection[int], field: str
) -> Iterator[tuple[int, RecordContent]]:
    """Yield line and content of the records at these lines of a raw file, ascending.

    ValueError, OSError as from `read_batches`. The file is read up to the last line only; records
    that cannot be read are passed over.
    """
    file = RawFile(str(path), path.stat().st_size)
    for batch in read_batches(file, [field], on_bad=lambda _: None):
        found = [(place, line) for place, line in enumerate(batch.lines) if line in lines]
        if isinstance(batch, TextBatch):
            yield from ((line, batch.texts[0][place]) for place, line in found)
        else:
            documents = np.split(batch.tokens, np.cumsum(batch.lengths)[:-1])
            yield from ((line, documents[place]) for place, line in found)
        if batch.lines[-1] >= max(lines):
            return


def find_raw_file(recorded: str, root: Path | None) -> Path | None:
    """Return where a raw file is today; None if it is gone.

    `root` replaces the folder that a relative path starts from; a file that was moved is also found
    by its name in `root` itself.
    """
    path = Path(recorded)
    places = [path] if root is None else [root / path, root / path.name]
    return next((place for place in places if place.is_file()), None)
