"""Digests of consumed rows. They add up, so batch size and parallel layout do not matter.

A row's digest is an XXH3-128 hash of bytes that begin with its number g: two u64 lanes, low lane
first (docs/order.md, section 10). Sums run modulo 2^64 in each lane, without a carry between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_ettin import native

if TYPE_CHECKING:
    from megatron_ettin.objectives import Batch
    from megatron_ettin.rows import Rows


def token_digest(rows: Rows, tokens: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return [2] uint64, the sum of the rows' token digests modulo 2^64 per lane, low lane first.

    `tokens` [m * seq_length] are the unmasked tokens. Idle rows and padding contribute nothing.
    """
    values = native.token_digests(rows.g, tokens, rows.cu_seqlens, rows.num_tokens, rows.seq_length)
    return values.sum(axis=0, dtype=np.uint64)


def mask_digest(batch: Batch) -> NDArray[np.uint64]:
    """Return [1] uint64, the sum of the rows' mask digests modulo 2^64.

    Only the low lane is recorded. The sum stays an array: NumPy arrays wrap around in silence,
    scalars with a warning. Idle rows and padding contribute nothing.
    """
    rows = batch.rows
    values = native.mask_digests(
        rows.g,
        batch.tokens,
        batch.labels,
        batch.loss_mask,
        rows.num_tokens,
        rows.seq_length,
        batch.weights,
    )
    return values.sum(keepdims=True, dtype=np.uint64)


def add_digests(one: tuple[int, int], other: Sequence[int]) -> tuple[int, int]:
    """Return the sum of two digests, each (low, high), modulo 2^64 per lane."""
    return (one[0] + other[0]) % 2**64, (one[1] + other[1]) % 2**64


def format_digest(lanes: tuple[int, int]) -> str:
    """Return a digest as 32 hexadecimal digits, high lane first; `lanes` is (low, high)."""
    return f"{lanes[1]:016x}{lanes[0]:016x}"
