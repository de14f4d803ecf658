"""Residual, counter dropout and LayerNorm on a GPU: one kernel forward, one backward.

No GPU has run this yet.

An element moves 8 bytes forward in bfloat16 (branch and residual in, sum and norm out) and 8 or 10
backward. Separate operations would move 14 and 20. Draws are made where they are used, forward and
backward, with the bits of csrc/dropout.cc (docs/order.md, section 7): no factors are stored. A draw
costs two 64-bit multiplications and serves four channels, which is cheaper than a read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from megatron_ettin.model.dropout import LayerDropout

GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
#: Channels that one draw serves.
LANES = tl.constexpr(4)
#: Elements of the tile that a program holds at a time: 16 per thread, two loads of 16 bytes each.
TILE_ELEMENTS = 2048
WARPS = 4
#: Programs of the backward pass: four for each multiprocessor of an H100. Each sums the weight's
#: gradient over its rows in float32 and writes one line of partial sums.
MOST_PROGRAMS = 528


def normalise(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return the norm of x [..., H] times `weight` [H], rounded once."""
    _, normed = _AddNorm.apply(None, x, weight, epsilon, None)  # type: ignore[no-untyped-call]
    out: torch.Tensor = normed
    return out


def add_and_normalise(
    branch: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    dropout: LayerDropout | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return residual + dropout(branch) [n, 1, H], rounded once, and its norm times `weight` [H].

    Raises:
        ValueError: H is no multiple of four, the channels of a draw.
    """
    if dropout is not None and branch.shape[-1] % LANES.value:
        raise ValueError(
            f"model.hidden_size: {branch.shape[-1]}: on a GPU, dropout needs a multiple of "
            f"{LANES.value}"
        )
    hidden, normed = _AddNorm.apply(  # type: ignore[no-untyped-call]
        branch, residual, weight, epsilon, dropout
    )
    return hidden, normed


class _AddNorm(torch.autograd.Function):
    """Sum and norm; the backward pass keeps the sum and two numbers a row, and draws again."""

    @staticmethod
    def forward(
        ctx: Any,
        branch: torch.Tensor | None,
        residual: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        dropout: LayerDropout | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        ctx.set_materialize_grads(False)
        residual = residual.contiguous()
        adds = branch is not None
        hidden = torch.empty_like(residual) if adds else residual
        normed = torch.empty_like(residual)
        channels = residual.shape[-1]
        rows = residual.numel() // channels
        of_rows = residual.new_empty((2, rows), dtype=torch.float32)
        if rows:
            shape = tile(channels)
            forward_rows[(triton.cdiv(rows, shape["ROWS"]),)](
                branch.contiguous() if branch is not None else residual,
                residual,
                weight,
                hidden,
                normed,
                of_rows,
                *_draws(dropout, weight),
                rows,
                channels,
                epsilon,
                ADDS=adds,
                DROPS=dropout is not None,
                **shape,
                num_warps=WARPS,
            )
        ctx.save_for_backward(hidden, weight, of_rows)
        ctx.adds, ctx.dropout = adds, dropout
        return hidden if adds else None, normed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, of_rows = ctx.saved_tensors
        of_hidden, of_normed = gradients
        if of_normed is None:
            of_normed = torch.zeros_like(hidden)
        drops = ctx.dropout is not None
        of_residual = torch.empty_like(hidden)
        # Without dropout both inputs of a sum have the same gradient.
        of_branch = torch.empty_like(hidden) if drops else of_residual
        channels = hidden.shape[-1]
        rows = hidden.numel() // channels
        shape = tile(channels)
        programs = min(triton.cdiv(rows, shape["ROWS"]), MOST_PROGRAMS)
        partial = torch.empty((programs, channels), dtype=torch.float32, device=hidden.device)
        if rows:
            backward_rows[(programs,)](
                of_normed.contiguous(),
                of_hidden.contiguous() if of_hidden is not None else of_normed,
                hidden,
                weight,
                of_rows,
                of_residual,
                of_branch,
                partial,
                *_draws(ctx.dropout, weight),
                rows,
                channels,
                programs,
                HAS_INCOMING=of_hidden is not None,
                DROPS=drops,
                **shape,
                num_warps=WARPS,
            )
        of_weight = partial.sum(dim=0).to(weight.dtype)
        return of_branch if ctx.adds else None, of_residual, of_weight, None, None


def tile(channels: int) -> dict[str, int]:
    """Return the shape of a program's tile: whole rows, as many as make TILE_ELEMENTS."""
    width = triton.next_power_of_2(channels)
    return {"ROWS": max(TILE_ELEMENTS // width, 1), "CHANNELS": max(width, LANES.value)}


def _draws(
    dropout: LayerDropout | None, unused: torch.Tensor
) -> tuple[torch.Tensor, int, int, float, int, int]:
    """Return the kernels' arguments g, key, threshold, kept, seq_length and first_slot."""
    if dropout is None:
        return unused, 0, 0, 1.0, 1, 0
    draws = dropout.draws()
    return (
        dropout.g,
        draws.key,
        draws.threshold,
        draws.kept,
        dropout.seq_length,
        dropout.first_slot,
    )


@triton.jit
def _mix(z):  # type: ignore[no-untyped-def]
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit  # type: ignore[untyped-decorator]
def _factors(  # type: ignore[no-untyped-def]
    row,
    rows,
    g_ptr,
    key,
    threshold,
    kept,
    seq_length,
    first_slot,
    channels,
    CHANNELS: tl.constexpr,
):
    """Return the dropout's factors [ROWS, CHANNELS] of slots first_slot + row [ROWS]."""
    slot = first_slot + row
    g = tl.load(g_ptr + slot // seq_length, mask=row < rows, other=-1)
    # As in csrc/counter_rng.h: absorb g into the key, then draw number `draw` of that stream. A
    # row of a document has seq_length * channels elements, four to a draw.
    row_key = _mix((key.to(tl.uint64) ^ g.to(tl.uint64)) + GAMMA)
    first = (slot % seq_length).to(tl.int64) * (channels // LANES)
    draw = first[:, None] + tl.arange(0, CHANNELS // LANES)[None, :]
    bits = _mix(row_key[:, None] + (draw + 1).to(tl.uint64) * GAMMA)
    lane_0 = (bits & 0xFFFF).to(tl.int32)
    lane_1 = ((bits >> 16) & 0xFFFF).to(tl.int32)
    lane_2 = ((bits >> 32) & 0xFFFF).to(tl.int32)
    lane_3 = (bits >> 48).to(tl.int32)
    lanes = tl.interleave(tl.interleave(lane_0, lane_2), tl.interleave(lane_1, lane_3))
    factor = tl.where(lanes < threshold, 0.0, kept)
    return tl.where(g[:, None] < 0, 1.0, factor)


@triton.jit(do_not_specialize=["key", "threshold", "first_slot", "rows"])  # type: ignore[untyped-decorator]
def forward_rows(  # type: ignore[no-untyped-def]
    branch_ptr,
    residual_ptr,
    weight_ptr,
    hidden_ptr,
    normed_ptr,
    of_rows_ptr,
    g_ptr,
    key: tl.uint64,
    threshold,
    kept,
    seq_length,
    first_slot,
    rows,
    channels,
    epsilon,
    ADDS: tl.constexpr,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write the sums (if ADDS) and norms of ROWS rows, and each row's mean and 1 / deviation."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CHANNELS)
    inside = (row[:, None] < rows) & (column[None, :] < channels)
    at = row[:, None].to(tl.int64) * channels + column[None, :]
    x = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if DROPS:
            # Dropped channels are multiplied by 0, not set to 0: NaN stays, as on the CPU.
            branch *= _factors(
                row, rows, g_ptr, key, threshold, kept, seq_length, first_slot, channels, CHANNELS
            )
        total = (x + branch).to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + at, total, mask=inside)
        # The norm of the rounded sum, which is what the backward pass reads.
        x = total.to(tl.float32)
    mean = tl.sum(x, axis=1) / channels
    centred = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / channels
    inverse = 1.0 / tl.sqrt(variance + epsilon)
    weight = tl.load(weight_ptr + column, mask=column < channels, other=0.0).to(tl.float32)
    tl.store(normed_ptr + at, centred * inverse[:, None] * weight[None, :], mask=inside)
    tl.store(of_rows_ptr + row, mean, mask=row < rows)
    tl.store(of_rows_ptr + rows + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["key", "threshold", "first_slot", "rows", "programs"])  # type: ignore[untyped-decorator]
def backward_rows(  # type: ignore[no-untyped-def]
    of_normed_ptr,
    of_hidden_ptr,
    hidden_ptr,
    weight_ptr,
    of_rows_ptr,
    of_residual_ptr,
    of_branch_ptr,
    partial_ptr,
    g_ptr,
    key: tl.uint64,
    threshold,
    kept,
    seq_length,
    first_slot,
    rows,
    channels,
    programs,
    HAS_INCOMING: tl.constexpr,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write the gradients of every `programs`-th tile, and the weight's sum over these tiles."""
    column = tl.arange(0, CHANNELS)
    exists = column < channels
    weight = tl.load(weight_ptr + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros([ROWS, CHANNELS], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & exists[None, :]
        at = row[:, None].to(tl.int64) * channels + column[None, :]
        mean = tl.load(of_rows_ptr + row, mask=row < rows, other=0.0)
        inverse = tl.load(of_rows_ptr + rows + row, mask=row < rows, other=0.0)
        x = tl.load(hidden_ptr + at, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(of_normed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scaled = tl.where(inside, (x - mean[:, None]) * inverse[:, None], 0.0)
        of_weight += gradient * scaled
        gradient *= weight
        share = tl.sum(gradient, axis=1) / channels
        along = tl.sum(gradient * scaled, axis=1) / channels
        out = (gradient - share[:, None] - scaled * along[:, None]) * inverse[:, None]
        if HAS_INCOMING:
            out += tl.load(of_hidden_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(of_residual_ptr + at, out, mask=inside)
        if DROPS:
            out *= _factors(
                row, rows, g_ptr, key, threshold, kept, seq_length, first_slot, channels, CHANNELS
            )
            tl.store(of_branch_ptr + at, out, mask=inside)
    place = partial_ptr + tl.program_id(0) * channels + column
    tl.store(place, tl.sum(of_weight, axis=0), mask=exists)
