"""Choice of a layer's modules: those of Megatron-Core and torch, or Transformer Engine's.

A backend changes speed and rounding, never the set of weights. Linears have weights of the same
names and shapes in both. Norms are never Transformer Engine's, because these carry a bias.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, assert_never

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ettin.config import Fp8Recipe, HardwareConfig, ModelConfig
from megatron_ettin.model.attention import (
    CoreAttention,
    KindAndLength,
    SdpaCoreAttention,
    layer_kind,
)
from megatron_ettin.model.attention_gpu import TransformerEngineCoreAttention, VarlenCoreAttention

Backend = Literal["local", "transformer_engine"]


@dataclass(frozen=True)
class Linears:
    """The linear modules of a layer, built with Megatron-Core's arguments."""

    column: Any
    """Module class that shards its output over tensor-parallel ranks."""
    row: Any
    """Module class that shards its input."""


def choose_backend(model: ModelConfig, hardware: HardwareConfig) -> Backend:
    """Return the backend that a model runs on, on this machine.

    Raises:
        ValueError: Transformer Engine is asked for, by name or by fp8, and cannot be used.
    """
    if model.uses_transformer_engine is False:
        return "local"
    lack = transformer_engine_lack()
    if lack is None and hardware.is_fp8:
        lack = _recipe_lack(hardware.fp8_recipe)
    if lack is None:
        # Transformer Engine's fp32 matmuls round their factors to TF32.
        return "local" if hardware.parameter_precision == "fp32" else "transformer_engine"
    if hardware.is_fp8:
        raise ValueError(f"hardware.precision: fp8 needs Transformer Engine on a GPU: {lack}")
    if model.uses_transformer_engine:
        raise ValueError(f"model.backend: transformer_engine cannot be used: {lack}")
    return "local"


@lru_cache(maxsize=1)
def transformer_engine_lack() -> str | None:
    """Return why Transformer Engine cannot be used here; None if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (AssertionError, ImportError, OSError, RuntimeError) as error:
        return f"transformer_engine.pytorch cannot be imported ({error})"
    return None


def _recipe_lack(recipe: Fp8Recipe) -> str | None:
    """Return why this GPU cannot run an fp8 recipe; None if it can."""
    from transformer_engine import pytorch as engine

    match recipe:
        case "blockwise":
            available, reason = engine.is_fp8_block_scaling_available(return_reason=True)
        case "tensorwise" | "delayed":
            available, reason = engine.is_fp8_available(return_reason=True)
        case _:
            assert_never(recipe)
    return None if available else f"hardware.fp8_recipe {recipe}: {reason}"


def by_transformer_engine(backend: Backend) -> bool:
    """Tell whether Transformer Engine computes a backend's layers."""
    match backend:
        case "transformer_engine":
            return True
        case "local":
            return False
        case _:
            assert_never(backend)


def linears(backend: Backend) -> Linears:
    """Return the linear modules of a backend."""
    if not by_transformer_engine(backend):
        return Linears(ColumnParallelLinear, RowParallelLinear)
    from megatron.core.extensions import transformer_engine as extension

    return Linears(extension.TEColumnParallelLinear, extension.TERowParallelLinear)


def core_attention(
    config: TransformerConfig, layer_number: int, by_engine: frozenset[KindAndLength] = frozenset()
) -> Callable[..., CoreAttention]:
    """Return what builds the core attention of layer `layer_number`, from 1.

    Transformer Engine computes layers of the kinds `by_engine`, over rows of the lengths there:
    those for which a measurement has found it faster. The kernels for GPUs take 16-bit tensors
    only. In fp32 a GPU therefore gets the CPU's attention, which waits for the segment boundaries
    at every layer: good for comparisons, not for training.
    """
    if not torch.cuda.is_available() or config.params_dtype == torch.float32:
        return SdpaCoreAttention
    kind = layer_kind(config, layer_number)
    lengths = frozenset(length for each, length in by_engine if each == kind)
    if lengths:
        return partial(TransformerEngineCoreAttention, row_lengths=lengths)
    return VarlenCoreAttention
