"""Counter dropout on a GPU: draws are made where they are used, forward and backward.

It gives the same bits as csrc/dropout.cc; docs/order.md, section 7, specifies them. No factors are
stored: a draw costs two 64-bit multiplications and serves four channels, which is cheaper than a
read.

No GPU has run this yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from megatron_ettin.model.dropout import LayerDraws

GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
LANES = tl.constexpr(4)
BLOCK_DRAWS = 256


def drop(hidden: torch.Tensor, g: torch.Tensor, draws: LayerDraws) -> torch.Tensor:
    """Return hidden [n, 1, H] times its factors, rounded once.

    `hidden` holds the slots from `draws.first_slot` on of the rows g [m] int64, which are on the
    same device.
    """
    dropped: torch.Tensor = _Drop.apply(hidden, g, draws)  # type: ignore[no-untyped-call]
    return dropped


class _Drop(torch.autograd.Function):
    """Multiplication by the factors; the backward pass draws the same factors once more."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, g: torch.Tensor, draws: LayerDraws) -> torch.Tensor:
        ctx.save_for_backward(g)
        ctx.draws = draws
        return _multiply(hidden, g, draws)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (g,) = ctx.saved_tensors
        return _multiply(gradients[0], g, ctx.draws), None, None


def _multiply(x: torch.Tensor, g: torch.Tensor, draws: LayerDraws) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    slots, channels = x.shape[0], x.shape[-1]
    row_size = draws.seq_length * channels
    first = draws.first_slot * channels
    first_row = draws.first_slot // draws.seq_length
    num_rows = (draws.first_slot + slots - 1) // draws.seq_length + 1 - first_row
    # A rank's share may begin inside of a draw, whose other lanes belong to the rank before.
    elements_of_a_row = first % row_size % LANES.value + min(row_size, x.numel())
    blocks_per_row = triton.cdiv(triton.cdiv(elements_of_a_row, LANES.value), BLOCK_DRAWS)
    multiply_rows[(num_rows * blocks_per_row,)](
        x,
        out,
        g,
        draws.key,
        draws.threshold,
        draws.kept,
        row_size,
        first,
        x.numel(),
        first_row,
        blocks_per_row,
        BLOCK=BLOCK_DRAWS,
    )
    return out


@triton.jit
def _mix(z):  # type: ignore[no-untyped-def]
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit(do_not_specialize=["key", "threshold", "first_row", "blocks_per_row"])  # type: ignore[untyped-decorator]
def multiply_rows(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    g_ptr,
    key: tl.uint64,
    threshold,
    kept,
    row_size,
    first,
    count,
    first_row,
    blocks_per_row,
    BLOCK: tl.constexpr,
):
    """Multiply `count` elements of a stream, from its element `first` on; BLOCK draws of one row.

    A row has row_size elements (slots times channels). `x_ptr` and `out_ptr` point to element
    `first`, `g_ptr` to the first row's number.
    """
    row = (first_row + tl.program_id(0) // blocks_per_row).to(tl.int64)
    block = tl.program_id(0) % blocks_per_row
    row_first = row * row_size - first
    begin = tl.maximum(-row_first, 0)
    draw = begin // LANES + block * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(g_ptr + row)
    # As in csrc/counter_rng.h: absorb g into the key, then draw number `draw` of that stream.
    row_key = _mix((key.to(tl.uint64) ^ g.to(tl.uint64)) + GAMMA)
    bits = _mix(row_key + (draw + 1).to(tl.uint64) * GAMMA)
    lane = tl.arange(0, LANES)[None, :]
    lane_bits = ((bits[:, None] >> (16 * lane).to(tl.uint64)) & 0xFFFF).to(tl.int32)
    factor = tl.where(lane_bits < threshold, 0.0, kept)
    factor = tl.where(g < 0, 1.0, factor)
    element = draw[:, None] * LANES + lane
    at = row_first + element
    inside = (element < row_size) & (at >= 0) & (at < count)
    # Multiplied in float32 and rounded once, as on the CPU. Dropped channels are multiplied by 0,
    # not set to 0, so that NaN and -0 stay as they are on the CPU.
    x = tl.load(x_ptr + at, mask=inside)
    tl.store(out_ptr + at, x * factor, mask=inside)
