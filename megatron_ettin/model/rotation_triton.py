"""Rotary positions on a GPU, in the buffer of the fused projection: one kernel each way.

No GPU has run this yet.

Queries and keys are rotated where they lie (RoFormer, arXiv 2104.09864), so that nothing is copied
before the attention: a channel of q, k and v moves 8/3 bytes in bfloat16. The backward pass writes
the gradients of queries, keys and values into one buffer of the projection's layout, 4 bytes a
channel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

#: Heads of slots (rows) that a program rotates; each thread has 16 bytes of a half in bfloat16.
ROWS = 32
WARPS = 4


def rotate_(
    qkv: torch.Tensor, positions: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate queries and keys in place; return views q, k, v [t, heads, size] of the buffer.

    Args:
        qkv: [t, heads, 3, size] contiguous, the projection's output; nothing else may need it.
        positions: [t] int64 position of each slot.
        table: [positions, 2, size / 2] float32 cosines and sines by position.
    """
    query, key, value = _Rotation.apply(qkv, positions, table)  # type: ignore[no-untyped-call]
    return query, key, value


class _Rotation(torch.autograd.Function):
    """Rotation in place; the backward pass turns the gradients back and packs them."""

    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, positions: torch.Tensor, table: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(positions, table)
        slots, heads, _, size = qkv.shape
        if slots:
            rotate_rows[(triton.cdiv(slots * heads, ROWS),)](
                qkv,
                positions,
                table,
                slots * heads,
                heads,
                size // 2,
                ROWS=ROWS,
                HALF=triton.next_power_of_2(size // 2),
                num_warps=WARPS,
            )
        # Three views of memory that autograd does not know: the projection keeps its input and its
        # weight for the backward pass, never this output.
        return qkv.detach().unbind(dim=2)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        positions, table = ctx.saved_tensors
        parts = [x if x.stride(-1) == 1 else x.contiguous() for x in gradients]
        slots, heads, size = parts[0].shape
        packed = parts[0].new_empty((slots, heads, 3, size))
        if slots:
            pack_rows[(triton.cdiv(slots * heads, ROWS),)](
                *parts,
                packed,
                positions,
                table,
                slots * heads,
                heads,
                size // 2,
                *(stride for part in parts for stride in part.stride()[:2]),
                ROWS=ROWS,
                HALF=triton.next_power_of_2(size // 2),
                num_warps=WARPS,
            )
        return packed, None, None


@triton.jit
def _angles(positions_ptr, table_ptr, slot, lane, half, inside):  # type: ignore[no-untyped-def]
    """Return cosines and sines [ROWS, HALF] of the rows' positions."""
    position = tl.load(positions_ptr + slot, mask=inside[:, None], other=0)
    place = table_ptr + position * (2 * half) + lane
    exists = inside[:, None] & (lane < half)
    cosine = tl.load(place, mask=exists, other=0.0)
    return cosine, tl.load(place + half, mask=exists, other=0.0), exists


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def rotate_rows(  # type: ignore[no-untyped-def]
    qkv_ptr,
    positions_ptr,
    table_ptr,
    rows,
    heads,
    half,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rotate queries and keys of ROWS rows [3, 2, half], each a head of a slot."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, HALF)[None, :]
    slot = (row // heads)[:, None].to(tl.int64)
    cosine, sine, exists = _angles(positions_ptr, table_ptr, slot, lane, half, row < rows)
    for part in tl.static_range(2):
        place = qkv_ptr + row[:, None].to(tl.int64) * (6 * half) + part * (2 * half) + lane
        first = tl.load(place, mask=exists, other=0.0).to(tl.float32)
        second = tl.load(place + half, mask=exists, other=0.0).to(tl.float32)
        tl.store(place, first * cosine - second * sine, mask=exists)
        tl.store(place + half, second * cosine + first * sine, mask=exists)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def pack_rows(  # type: ignore[no-untyped-def]
    query_ptr,
    key_ptr,
    value_ptr,
    packed_ptr,
    positions_ptr,
    table_ptr,
    rows,
    heads,
    half,
    query_slot_stride,
    query_head_stride,
    key_slot_stride,
    key_head_stride,
    value_slot_stride,
    value_head_stride,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Write gradients of ROWS rows, those of queries and keys turned back, as [3, 2, half]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, HALF)[None, :]
    slot = (row // heads)[:, None].to(tl.int64)
    head = (row % heads)[:, None].to(tl.int64)
    cosine, sine, exists = _angles(positions_ptr, table_ptr, slot, lane, half, row < rows)
    place = packed_ptr + row[:, None].to(tl.int64) * (6 * half) + lane
    query = query_ptr + slot * query_slot_stride + head * query_head_stride + lane
    first = tl.load(query, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(query + half, mask=exists, other=0.0).to(tl.float32)
    tl.store(place, first * cosine + second * sine, mask=exists)
    tl.store(place + half, second * cosine - first * sine, mask=exists)
    key = key_ptr + slot * key_slot_stride + head * key_head_stride + lane
    first = tl.load(key, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(key + half, mask=exists, other=0.0).to(tl.float32)
    tl.store(place + 2 * half, first * cosine + second * sine, mask=exists)
    tl.store(place + 3 * half, second * cosine - first * sine, mask=exists)
    value = value_ptr + slot * value_slot_stride + head * value_head_stride + lane
    tl.store(place + 4 * half, tl.load(value, mask=exists, other=0.0), mask=exists)
    tl.store(place + 5 * half, tl.load(value + half, mask=exists, other=0.0), mask=exists)
