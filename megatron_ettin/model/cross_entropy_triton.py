"""Softmax and its gradient over logits [c, columns] on a GPU: two passes, in the logits' own type.

With logits in bfloat16 a chunk moves 14 bytes a logit: the matmul writes 2, the statistics read 2,
the gradient in place reads and writes 4, and two matmuls and the bias read 2 each. All arithmetic
is in float32. Every number has one writer and a fixed order of sums, so results repeat.

No GPU has run this yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Elements of one row per iteration: 16 per thread, which are two loads of 16 bytes in bfloat16.
BLOCK_COLUMNS = 4096
WARPS = 8


def statistics(logits: torch.Tensor, labels: torch.Tensor, first: int, real: int) -> torch.Tensor:
    """Return [3, c] float32: highest logit, sum of exp(logit - highest), the label's logit.

    A rank whose columns are all padding gets -inf, 0 and 0, which add nothing to the other ranks'.

    Args:
        logits: [c, columns] of this rank, contiguous; they stay as they are.
        labels: [c] int64 columns of the whole vocabulary. If another rank holds a label's column,
            its logit here is 0.
        first: number of this rank's first column in the whole vocabulary.
        real: number of this rank's columns that are no padding.
    """
    rows, columns = logits.shape
    by_row = logits.new_empty((3, rows), dtype=torch.float32)
    row_statistics[(rows,)](
        logits, labels, by_row, rows, columns, first, real, BLOCK=BLOCK_COLUMNS, num_warps=WARPS
    )
    return by_row


def gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    real: int,
    peak: torch.Tensor,
    share: torch.Tensor,
) -> None:
    """Turn logits [c, columns] into softmax minus one-hot in place, rounded once.

    A probability is share [c] * exp(logit - peak [c]), and 0 in a column of padding.
    """
    rows, columns = logits.shape
    grid = (rows, triton.cdiv(columns, BLOCK_COLUMNS))
    row_gradient[grid](
        logits, labels, peak, share, columns, first, real, BLOCK=BLOCK_COLUMNS, num_warps=WARPS
    )


# Triton compiles a variant for pointers and integers that are multiples of 16. Arguments that
# differ between the chunks of a step are not specialised, so that each kernel is compiled once.
@triton.jit(do_not_specialize=["labels_ptr", "rows", "first"])  # type: ignore[untyped-decorator]
def row_statistics(  # type: ignore[no-untyped-def]
    logits_ptr,
    labels_ptr,
    by_row_ptr,
    rows,
    columns,
    first,
    real,
    BLOCK: tl.constexpr,
):
    """Write the statistics of a row; the sums are rescaled once a block."""
    row = tl.program_id(0).to(tl.int64)
    line = logits_ptr + row * columns
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, real, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        # The mask is `columns`, a multiple of 16 after padding, and not `real`: only then may the
        # compiler use loads of 16 bytes.
        x = tl.load(line + at, mask=at < columns, other=0.0).to(tl.float32)
        x = tl.where(at < real, x, float("-inf"))
        highest = tl.maximum(peak, tl.max(x, axis=0))
        total = total * tl.exp(peak - highest) + tl.exp(x - highest)
        peak = highest
    column = tl.load(labels_ptr + row) - first
    owned = (column >= 0) & (column < real)
    label = tl.load(line + column, mask=owned, other=0.0).to(tl.float32)
    # Layout [3, rows]: peak, total, the label's logit.
    tl.store(by_row_ptr + row, peak)
    tl.store(by_row_ptr + rows + row, tl.sum(total, axis=0))
    tl.store(by_row_ptr + 2 * rows + row, label)


@triton.jit(do_not_specialize=["labels_ptr", "first"])  # type: ignore[untyped-decorator]
def row_gradient(  # type: ignore[no-untyped-def]
    logits_ptr,
    labels_ptr,
    peak_ptr,
    share_ptr,
    columns,
    first,
    real,
    BLOCK: tl.constexpr,
):
    """Replace BLOCK logits of a row by their gradients."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    place = logits_ptr + row * columns + at  # 64-bit: a chunk may hold more than 2^31 logits
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(at < real, x - tl.load(peak_ptr + row), float("-inf"))
    probability = tl.exp(x) * tl.load(share_ptr + row)
    column = tl.load(labels_ptr + row) - first
    tl.store(place, probability - tl.where(at == column, 1.0, 0.0), mask=inside)
