"""The one door to the C++ extension: nobody else imports `_native`.

numpy in, numpy out; arrays are 1-D, C-contiguous copies unless said otherwise. Long calls release
the GIL. A bad argument raises ValueError (a bad index IndexError, a lossy dtype TypeError) naming
it; the file system raises OSError. What the functions compute is specified in docs/order.md.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_ettin import _native
from megatron_ettin._native import (
    PhaseOrder,
    RowPlan,
    TokenFile,
    TokenFileBuilder,
    build_row_plan,
)

__all__ = [
    "BLEND_PERIOD",
    "PhaseOrder",
    "RowPlan",
    "TokenFile",
    "TokenFileBuilder",
    "assemble_rows",
    "blend_quotas",
    "blend_table",
    "build_row_plan",
    "counter_draws",
    "counter_key",
    "dropout_factors",
    "initial_weights",
    "mask_digests",
    "mask_tokens",
    "order_digests",
    "permutation_key",
    "permute",
    "token_digests",
    "uniform_weights",
    "unpermute",
    "xxh3_64",
    "xxh3_128",
]

BLEND_PERIOD = 65_536
"""Rows after which a blend repeats its pattern of sources."""


def counter_key(seed: int, purpose: int, words: Sequence[int]) -> int:
    """Return the 64-bit key of a family of draws (docs/order.md, section 1).

    All arguments are unsigned 64-bit. Purposes: 1 permutation, 2 mask, 3 normal weights, 4 uniform
    weights, 5 dropout.
    """
    return _native.counter_key(seed, purpose, words)


def counter_draws(key: int, first: int, count: int) -> NDArray[np.uint64]:
    """Return draws number first, first + 1, ... of a key: uint64[count]."""
    return _native.counter_draws(key, first, count)


def permutation_key(seed: int, source: int, epoch: int) -> int:
    """Return the key of the permutation that orders one epoch of one source (u64 each)."""
    return _native.permutation_key(seed, source, epoch)


@lru_cache(maxsize=16)
def _permutation(n: int, key: int) -> _native.Permutation:
    # A permutation of at most 65,536 elements is a table that takes longer to fill than to use.
    return _native.Permutation(n, key)


def permute(n: int, key: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Apply the keyed permutation of [0, n), n <= 2^62, to int64[m] indices."""
    return _permutation(n, key).forward(index)


def unpermute(n: int, key: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Undo `permute`: int64[m] values in [0, n) back to their indices."""
    return _permutation(n, key).inverse(index)


def blend_quotas(weights: Sequence[float], period: int = BLEND_PERIOD) -> list[int]:
    """Round weights to integer quotas that sum to the period, by largest remainder.

    Exact rational arithmetic; equal remainders go to the lower index. Raises ValueError naming the
    weight that is not a finite number > 0 or whose share is below 1 / period.
    """
    # With its decimals it takes longer to import than a question about a ledger to answer.
    from fractions import Fraction

    if not weights:
        raise ValueError("a blend needs at least one weight")
    for i, weight in enumerate(weights):
        if not 0 < weight < float("inf"):
            raise ValueError(f"weights[{i}] is {weight}; a weight must be a finite number > 0")
    exact = [Fraction(weight) for weight in weights]
    shares = [weight / sum(exact) * period for weight in exact]
    for i, share in enumerate(shares):
        if share < 1:
            raise ValueError(
                f"weights[{i}] = {weights[i]} is {float(share / period):.3g} of the blend, less "
                f"than the smallest share 1/{period}; raise it or drop the source"
            )
    quotas = [share.numerator // share.denominator for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (quotas[i] - shares[i], i))
    for i in by_remainder[: period - sum(quotas)]:
        quotas[i] += 1
    return quotas


def blend_table(quotas: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return (source, rank) of each slot of a blend period: int32[sum(quotas)] each.

    Rank counts the earlier slots of the same source. The quotas must be >= 1 and sum to a power of
    two <= 2^20.
    """
    return _native.blend_table(quotas)


def assemble_rows(
    plans: Sequence[RowPlan],
    source_slot: NDArray[np.int32],
    row: NDArray[np.int64],
    *,
    seq_length: int,
    max_segments_per_row: int,
    cls_id: int,
    sep_id: int,
    pad_id: int,
) -> tuple[
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int32],
    NDArray[np.uint8],
    NDArray[np.int64],
]:
    """Build the packed stream of m rows of L = seq_length slots, S = max_segments_per_row.

    plans hold one entry per source; row r is row[r] of plans[source_slot[r]], or idle
    (padding only) where both are -1. Special tokens are added where the plan says so.

    Returns:
        tokens: int64[m*L].
        position_ids: int64[m*L], from 0 in each segment, the padding tail included.
        cu_seqlens: int32[m*(S+1) + 1], non-decreasing, over the whole stream. Each row has S + 1
            segments: its pieces (one segment for all of them if its plan's pack is "concat"), its
            padding tail, empty ones.
        segment_kind: uint8[m*(S+1)]; 0 padding or empty, 1 a piece that does not end its document,
            2 a piece that does.
        num_tokens: int64[m], slots that are not padding.
    """
    return _native.assemble_rows(
        plans,
        source_slot,
        row,
        seq_length=seq_length,
        max_segments_per_row=max_segments_per_row,
        cls_id=cls_id,
        sep_id=sep_id,
        pad_id=pad_id,
    )


def mask_tokens(
    tokens: NDArray[np.int64],
    g: NDArray[np.int64],
    *,
    seq_length: int,
    mask_seed: int,
    mask_rate: float,
    mask_id: int,
    vocab_size: int,
    special_ids: Sequence[int],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Mask m rows for masked-language modelling by (mask_seed, g, position in the row) alone.

    A token is selected with probability mask_rate unless it is in special_ids (which must hold the
    padding id). Of the selected, 80 % become mask_id, 10 % a random id in [0, vocab_size), and 10 %
    stay. A row with g < 0 is idle and stays as it is.

    Returns:
        masked: int64[m*L], the input with its replacements.
        selected: bool[m*L]; the labels are the input tokens there.
    """
    return _native.mask_tokens(
        tokens,
        g,
        seq_length=seq_length,
        mask_seed=mask_seed,
        mask_rate=mask_rate,
        mask_id=mask_id,
        vocab_size=vocab_size,
        special_ids=special_ids,
    )


def dropout_factors(
    g: NDArray[np.int64],
    *,
    seq_length: int,
    channels: int,
    seed: int,
    layer: int,
    rate: float,
    first_slot: int = 0,
    num_slots: int | None = None,
) -> NDArray[np.float32]:
    """Return the factors of a layer's dropout for a stream of m rows of L = seq_length slots.

    A function of (seed, layer, g, position in the row, channel) alone. A factor is 0 with
    probability `rate` (rounded up to a multiple of 2^-16), else the reciprocal of the probability
    to be kept; in an idle row (g < 0) it is 1.

    Returns:
        float32[n * channels] for the n = num_slots slots from first_slot on; all m*L slots, or
        those that remain, if num_slots is not given.
    """
    return _native.dropout_factors(
        g,
        seq_length=seq_length,
        channels=channels,
        seed=seed,
        layer=layer,
        rate=rate,
        first_slot=first_slot,
        num_slots=num_slots,
    )


def initial_weights(
    name: str,
    seed: int,
    begin: int,
    count: int,
    *,
    std: float,
    cutoff_std: float = 2.0,
) -> NDArray[np.float32]:
    """Return elements [begin, begin + count) of a tensor drawn from a truncated normal.

    The tensor is a function of (seed, name) alone: a slice equals the same range of the whole. The
    distribution is N(0, std^2) cut at +-cutoff_std * std; the cut lowers the variance and that is
    not corrected. Raises ValueError for begin or count < 0, std <= 0 or cutoff_std
    outside (0, 7].
    """
    return _native.initial_weights(name, seed, begin, count, std=std, cutoff_std=cutoff_std)


def uniform_weights(
    name: str, seed: int, begin: int, count: int, low: float, high: float
) -> NDArray[np.float32]:
    """Return elements [begin, begin + count) of a tensor uniform on [low, high]."""
    return _native.uniform_weights(name, seed, begin, count, low, high)


def xxh3_64(data: bytes | bytearray | memoryview | NDArray[np.generic]) -> int:
    """Return XXH3-64 (seed 0) of bytes or of any buffer that lies in one piece."""
    return _native.xxh3_64(data)


def xxh3_128(data: bytes | bytearray | memoryview | NDArray[np.generic]) -> int:
    """Return XXH3-128 (seed 0) of bytes or of any buffer that lies in one piece."""
    return _native.xxh3_128(data)


def order_digests(
    plans: Sequence[RowPlan],
    g: NDArray[np.int64],
    source_ids: NDArray[np.uint64],
    source_slot: NDArray[np.int32],
    epoch: NDArray[np.int64],
    row: NDArray[np.int64],
) -> NDArray[np.uint64]:
    """Hash where each of m rows comes from: uint64[m, 2], low lane first; no token is read.

    plans and source_ids hold one entry per source; row i is row[i] of plans[source_slot[i]] in
    epoch[i]. An idle row (g < 0) has value 0. The bytes are those of docs/order.md, section 10.
    Raises ValueError (IndexError for `row`) naming the entry.
    """
    return _native.order_digests(plans, g, source_ids, source_slot, epoch, row)


def token_digests(
    g: NDArray[np.int64],
    tokens: NDArray[np.int64],
    cu_seqlens: NDArray[np.int32],
    num_tokens: NDArray[np.int64],
    seq_length: int,
) -> NDArray[np.uint64]:
    """Hash the unmasked tokens of each of m rows: uint64[m, 2], low lane first.

    tokens: int64[m*L]. cu_seqlens (int32[m*K + 1], the same number of segments K for each row) and
    num_tokens (int64[m]) are those of `assemble_rows`; padding is left out and an idle row (g < 0)
    has value 0. The bytes are those of docs/order.md, section 10. Raises ValueError naming the row
    whose segments do not end at its num_tokens, or whose token is no u32.
    """
    return _native.token_digests(g, tokens, cu_seqlens, num_tokens, seq_length)


def mask_digests(
    g: NDArray[np.int64],
    inputs: NDArray[np.int64],
    labels: NDArray[np.int64],
    loss_mask: NDArray[np.bool_],
    num_tokens: NDArray[np.int64],
    seq_length: int,
) -> NDArray[np.uint64]:
    """Hash what each of m rows shows a model and scores: uint64[m], low lanes.

    inputs, labels (read where loss_mask is set), loss_mask: [m*L]; padding is left out and an idle
    row (g < 0) has value 0. The bytes are those of docs/order.md, section 10. Raises ValueError
    naming the row and slot of an id that is no u32, or a scored label that is 2^32 - 1.
    """
    return _native.mask_digests(g, inputs, labels, loss_mask, num_tokens, seq_length)
