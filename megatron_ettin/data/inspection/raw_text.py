"""Contents of single raw records, found again by file and line."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.data.readers import read_files

RecordContent = str | NDArray[np.integer]
"""Text of a record, or its token ids [n] where the raw file holds these."""


def contents_at(
    path: Path, lines: Collection[int], field: str
) -> Iterator[tuple[int, RecordContent]]:
    """Yield line and content of the records at these lines of a raw file, ascending.

    ValueError, OSError as `read_files` raises them. The file is read up to the last line only.
    """
    last = max(lines)
    for record in read_files([path], [field]):
        if record.line in lines:
            yield record.line, record.texts[0]
        if record.line >= last:
            return


def find_raw_file(recorded: str, root: Path | None) -> Path | None:
    """Return where a raw file is today; None if it is gone.

    `root` replaces the folder that a relative path starts from; a file that was moved is also found
    by its name in `root` itself.
    """
    path = Path(recorded)
    places = [path] if root is None else [root / path, root / path.name]
    return next((place for place in places if place.is_file()), None)
