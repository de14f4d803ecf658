"""Arrow columns of NumPy arrays and Python lists, made without `pa.array`.

`pa.array` would import pandas first, which takes longer than a small corpus.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def int64_column(values: NDArray[np.int64]) -> pa.Array:
    """Return numbers [n] as an array that shares their memory."""
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(values)])


def line_numbers(lines: Sequence[int]) -> NDArray[np.int64]:
    """Return the lines of a batch, which are often a range, as an array [n]."""
    if isinstance(lines, range):
        return np.arange(lines.start, lines.stop)
    return np.array(lines, dtype=np.int64)


def text_column(names: list[str | None] | None, places: NDArray[np.int64]) -> pa.Array:
    """Return the names at some places as an array; null where one is None."""
    if names is None:
        return pa.nulls(len(places), pa.string())
    contents = [(name or "").encode() for name in names]
    offsets = np.zeros(len(names) + 1, dtype=np.int32)
    np.cumsum([len(content) for content in contents], out=offsets[1:])
    known = np.packbits([name is not None for name in names], bitorder="little")
    buffers = [pa.py_buffer(each) for each in (known, offsets, b"".join(contents))]
    array = pa.Array.from_buffers(pa.string(), len(names), buffers)
    return array if len(places) == len(names) else array.take(int64_column(places))
