"""Core attention on a GPU, packed and in 16 bits: torch's varlen kernel, or Transformer Engine's.

Both take the stream with its segment boundaries in device memory: the host never waits for their
values, and shapes are constant. Neither needs a package beyond the backend's own. Where flash-attn
is installed, Transformer Engine may choose it.

No GPU has run this yet.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import torch

from megatron_ettin.model.attention import CoreAttention, PackedRows, random_projection

logger = logging.getLogger(__name__)

UNFUSED = "NVTE_UNFUSED_ATTN"
#: Window of a causal layer in the kernels' terms; with windows, they call no mask causal.
CAUSAL = (-1, 0)
NO_DROPOUT = 0.0


class VarlenCoreAttention(CoreAttention):
    """The flash attention inside torch (FlashAttention-2, arXiv 2307.08691).

    Its backward pass is deterministic under `torch.use_deterministic_algorithms`.
    """

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedRows
    ) -> torch.Tensor:
        """Attend over a whole stream: query, key, value and the result are [t, heads, size]."""
        is_causal, window = self.sight(packed)
        return varlen(query, key, value, packed, self.scale, is_causal=is_causal, window=window)


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedRows,
    scale: float | None,
    *,
    is_causal: bool,
    window: tuple[int, int] | None,
) -> torch.Tensor:
    """Call torch's kernel: query, key, value and the result are [t, heads, size].

    They may be views of one buffer: only the channels of a head must be consecutive.
    """
    out: torch.Tensor = _Varlen.apply(  # type: ignore[no-untyped-call]
        query,
        key,
        value,
        packed.cu_seqlens_q,
        packed.max_seqlen_q,
        scale,
        varlen_window(is_causal=is_causal, window=window),
    )
    return out


class _Varlen(torch.autograd.Function):
    """The two kernels, called directly.

    `torch.nn.attention.varlen` wraps each in a custom operator, which takes the host three times as
    long (docs/performance.md).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        boundaries: torch.Tensor,
        longest: int,
        scale: float | None,
        window: tuple[int, int],
    ) -> torch.Tensor:
        out, logsumexp, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            boundaries,
            boundaries,
            longest,
            longest,
            NO_DROPOUT,
            window == CAUSAL,
            False,  # no mask for debugging
            **_of_kernel(scale, window),
        )
        ctx.save_for_backward(query, key, value, boundaries, out, logsumexp, seed, offset)
        ctx.longest, ctx.scale, ctx.window = longest, scale, window
        return cast(torch.Tensor, out)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, boundaries, out, logsumexp, seed, offset = ctx.saved_tensors
        of_inputs = torch.ops.aten._flash_attention_backward(
            gradients[0],
            query,
            key,
            value,
            out,
            logsumexp,
            boundaries,
            boundaries,
            ctx.longest,
            ctx.longest,
            NO_DROPOUT,
            ctx.window == CAUSAL,
            seed,
            offset,
            **_of_kernel(ctx.scale, ctx.window),
        )
        return (*of_inputs, None, None, None, None)


def _of_kernel(scale: float | None, window: tuple[int, int]) -> dict[str, float | None]:
    return {"scale": scale, "window_size_left": window[0], "window_size_right": window[1]}


def varlen_window(*, is_causal: bool, window: tuple[int, int] | None) -> tuple[int, int]:
    """Return (keys to the left, to the right) in the kernels' terms: -1 is no bound."""
    if window is not None:
        return window
    return CAUSAL if is_causal else (-1, -1)


class TransformerEngineCoreAttention(CoreAttention):
    """Transformer Engine's packed attention (cuDNN's, or flash-attn's if that is installed).

    Rows of another direction than the model's get torch's kernel, and so do rows of other lengths
    than `row_lengths`, if these are given: for them it was not measured to be faster.

    It runs in bf16 under every fp8 recipe: on Hopper its fp8 attention has neither windows nor a
    packed backward pass. Context parallelism is done around it (`CoreAttention.forward`), so it is
    not told of any.
    """

    def __init__(
        self, *args: Any, row_lengths: frozenset[int] | None = None, **kwargs: Any
    ) -> None:
        """Build the attention of a layer, for a rank's share of the heads."""
        super().__init__(*args, **kwargs)
        self.row_lengths = row_lengths
        config = self.config
        ranks = config.tensor_model_parallel_size * config.context_parallel_size
        self.heads = config.num_attention_heads // ranks
        self.kernel = packed_kernel(
            self.heads,
            config.kv_channels,
            is_causal=self.is_causal,
            window=self.window,
            scale=self.scale,
        )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedRows
    ) -> torch.Tensor:
        """Attend over a whole stream: query, key, value and the result are [t, heads, size]."""
        is_causal, window = self.sight(packed)
        serves = self.row_lengths is None or packed.max_seqlen_q in self.row_lengths
        if is_causal != self.is_causal or not serves:
            return varlen(query, key, value, packed, self.scale, is_causal=is_causal, window=window)
        return by_packed_kernel(
            self.kernel, query, key, value, packed.cu_seqlens_q, packed.max_seqlen_q
        )


def by_packed_kernel(
    kernel: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """Call Transformer Engine's attention: query, key, value and the result are [t, heads, size].

    Views of one buffer are copied first. Transformer Engine would guess from their addresses that
    they are views, a way that it calls deprecated; and the way that it offers instead, to take the
    buffer, costs more in the backward pass than the copy (docs/decisions/0020).
    """
    query, key, value = (x.contiguous() for x in (query, key, value))
    with packed_kernels_only():
        out: torch.Tensor = kernel(
            query,
            key,
            value,
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
    return out.view(query.shape)


def packed_kernel(
    heads: int,
    head_size: int,
    *,
    is_causal: bool,
    window: tuple[int, int] | None,
    scale: float | None = None,
) -> torch.nn.Module:
    """Return Transformer Engine's attention over packed segments of `heads` heads."""
    from transformer_engine.pytorch import DotProductAttention

    kernel: torch.nn.Module = DotProductAttention(
        heads,
        head_size,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal" if is_causal else "padding",
        window_size=window,
        softmax_scale=scale,
    )
    return kernel


@contextmanager
def packed_kernels_only() -> Iterator[None]:
    """Forbid Transformer Engine's unfused attention inside the block; it raises instead.

    The unfused attention pads all segments to the longest one and needs memory for the square of
    its length. Transformer Engine reads the environment variable whenever it chooses a kernel,
    while Megatron-Core demands another value when it builds a model: so it is set here, call by
    call.
    """
    before = os.environ.get(UNFUSED)
    os.environ[UNFUSED] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[UNFUSED]
        else:
            os.environ[UNFUSED] = before


@lru_cache
def transformer_engine_attends(
    heads: int, head_size: int, *, is_causal: bool, window: tuple[int, int] | None
) -> bool:
    """Tell whether Transformer Engine has a packed kernel of this kind, by running one once.

    No table says so: support depends on versions, device and shapes, and a missing kernel raises.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    # A long segment, one within the window, and an empty one as at the end of every row.
    cu_seqlens = torch.tensor([0, 208, 256, 256], dtype=torch.int32, device=device)
    q, k, v = random_projection(256, heads, head_size, dtype=torch.bfloat16, device=device)
    try:
        kernel = packed_kernel(heads, head_size, is_causal=is_causal, window=window)
        out = by_packed_kernel(kernel, q, k, v, cu_seqlens, longest=256)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        torch.cuda.synchronize()
    except (AssertionError, RuntimeError, ValueError) as error:
        kind = f"window {window}" if window else "whole documents"
        logger.info("attention (%s): torch's kernel; Transformer Engine has none: %s", kind, error)
        return False
    return True
