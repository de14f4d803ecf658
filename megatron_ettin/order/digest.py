"""Additive 128-bit digest of the tokens that rows hold: equal for any batch size and any layout."""

from __future__ import annotations

import struct

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_ettin.objectives import Rows


def token_digest(rows: Rows, tokens: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return [2] uint64, the sum (mod 2^64 per lane, low lane first) of XXH3-128 over the rows.

    `tokens` [m * seq_length] are the unmasked tokens. A row's bytes are, little-endian: u64 g,
    u32 number of segments, u32 length of each segment, u32 of each token; padding is left out
    and idle rows contribute nothing.
    """
    total = np.zeros(2, dtype=np.uint64)
    per_row = (len(rows.cu_seqlens) - 1) // len(rows.g)
    borders = rows.cu_seqlens.astype(np.int64)
    for slot, g in enumerate(rows.g.tolist()):
        if g < 0:
            continue
        begin = slot * rows.seq_length
        end = begin + int(rows.num_tokens[slot])
        edges = borders[slot * per_row : (slot + 1) * per_row + 1]
        lengths = np.diff(edges[edges <= end])
        lengths = lengths[lengths > 0].astype("<u4")
        content = xxhash.xxh3_128(struct.pack("<QI", g, len(lengths)))
        content.update(lengths.tobytes())
        content.update(tokens[begin:end].astype("<u4").tobytes())
        value = content.intdigest()
        total += np.array([value & 0xFFFFFFFFFFFFFFFF, value >> 64], dtype=np.uint64)
    return total


def format_digest(lanes: tuple[int, int]) -> str:
    """Return a digest as 32 hexadecimal digits, high lane first; `lanes` is (low, high)."""
    return f"{lanes[1]:016x}{lanes[0]:016x}"
