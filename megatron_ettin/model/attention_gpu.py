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
from torch.nn.attention.varlen import varlen_attn

from megatron_ettin.model.attention import CoreAttention, PackedRows

logger = logging.getLogger(__name__)

UNFUSED = "NVTE_UNFUSED_ATTN"


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
    """Call torch's kernel: query, key, value and the result are [t, heads, size]."""
    out = varlen_attn(
        query,
        key,
        value,
        packed.cu_seqlens_q,
        packed.cu_seqlens_kv,
        packed.max_seqlen_q,
        packed.max_seqlen_kv,
        scale=scale,
        window_size=varlen_window(is_causal=is_causal, window=window),
    )
    return cast(torch.Tensor, out)


def varlen_window(*, is_causal: bool, window: tuple[int, int] | None) -> tuple[int, int]:
    """Return (keys to the left, to the right) in the kernels' terms: -1 is no bound."""
    if window is not None:
        return window
    return (-1, 0) if is_causal else (-1, -1)


class TransformerEngineCoreAttention(CoreAttention):
    """Transformer Engine's packed attention (cuDNN's, or flash-attn's if that is installed).

    It has a kernel for the model's direction. Rows of the other one get a second kernel, or torch's
    where Transformer Engine has none.

    It runs in bf16 under every fp8 recipe: on Hopper its fp8 attention has neither windows nor a
    packed backward pass. Context parallelism is done around it (`CoreAttention.forward`), so it is
    not told of any.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the attention of a layer, for a rank's share of the heads."""
        super().__init__(*args, **kwargs)
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
        # In a list, so that it is no submodule: a checkpoint's names must not depend on it.
        self.other_kernel: list[torch.nn.Module] = []

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedRows
    ) -> torch.Tensor:
        """Attend over a whole stream: query, key, value and the result are [t, heads, size]."""
        kernel: torch.nn.Module = self.kernel
        is_causal, window = self.sight(packed)
        if is_causal != self.is_causal:
            size = self.config.kv_channels
            if not transformer_engine_attends(self.heads, size, is_causal=is_causal, window=window):
                return varlen(
                    query, key, value, packed, self.scale, is_causal=is_causal, window=window
                )
            if not self.other_kernel:
                other = packed_kernel(
                    self.heads, size, is_causal=is_causal, window=window, scale=self.scale
                )
                self.other_kernel.append(other)
            (kernel,) = self.other_kernel
        with packed_kernels_only():
            out: torch.Tensor = kernel(
                query,
                key,
                value,
                cu_seqlens_q=packed.cu_seqlens_q,
                cu_seqlens_kv=packed.cu_seqlens_kv,
                max_seqlen_q=packed.max_seqlen_q,
                max_seqlen_kv=packed.max_seqlen_kv,
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
    device = torch.cuda.current_device()
    # A long segment, one within the window, and an empty one as at the end of every row.
    cu_seqlens = torch.tensor([0, 208, 256, 256], dtype=torch.int32, device=device)
    shape = (256, heads, head_size)
    q, k, v = (
        torch.zeros(shape, dtype=torch.bfloat16, device=device, requires_grad=True)
        for _ in range(3)
    )
    try:
        kernel = packed_kernel(heads, head_size, is_causal=is_causal, window=window)
        lengths = {"max_seqlen_q": 256, "max_seqlen_kv": 256}
        with packed_kernels_only():
            out = kernel(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, **lengths)
        out.backward(torch.ones_like(out))
        torch.cuda.synchronize()
    except (AssertionError, RuntimeError, ValueError) as error:
        kind = f"window {window}" if window else "whole documents"
        logger.info("attention (%s): torch's kernel; Transformer Engine has none: %s", kind, error)
        return False
    return True
