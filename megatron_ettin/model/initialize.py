"""Initial weights ("full_megatron") as a function of (init_seed, Hugging Face name, element).

The weights are therefore equal under every parallel layout and for both twins. Source of the
scheme: ModernBERT `src/bert_layers/initialization.py`.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch

from megatron_ettin import native
from megatron_ettin.config import ModelConfig
from megatron_ettin.model import weight_map


def initial_tensor(entry: weight_map.Entry, model: ModelConfig, seed: int) -> torch.Tensor:
    """Return the initial value of a whole tensor, float32, in Megatron-Core's row order."""
    shape = weight_map.huggingface_shape(entry, model)
    count = math.prod(shape)
    if entry.init == "norm":
        values = np.ones(count, dtype=np.float32)
    elif entry.init == "bias":
        # torch.nn.Linear's default, because the released code never initialises this bias itself.
        bound = 1.0 / math.sqrt(model.hidden_size)
        values = native.uniform_weights(entry.encoder, seed, 0, count, -bound, bound)
    else:
        shrink = math.sqrt(2.0 * model.num_layers) if entry.init == "out" else 1.0
        values = native.initial_weights(entry.encoder, seed, 0, count, std=model.init_std / shrink)
    return weight_map.from_huggingface(entry, torch.from_numpy(values).view(shape), model)


def local_shard(
    whole: torch.Tensor, parameter: torch.nn.Parameter, rank: int, size: int
) -> torch.Tensor:
    """Return the part of `whole` that tensor-parallel `rank` of `size` holds as `parameter`.

    Megatron-Core marks a sharded parameter with `tensor_model_parallel`, `partition_dim` and
    `partition_stride`; a stride of 2 means that both halves of the gated MLP are split.
    """
    if not getattr(parameter, "tensor_model_parallel", False) or size == 1:
        return whole
    marks = cast(Any, parameter)
    dim, stride = marks.partition_dim, marks.partition_stride
    chunks = torch.chunk(whole, size * stride, dim=dim)
    # Stride 2: the first `size` chunks are those of the activated half, the others those of the
    # gate; a rank holds one of each.
    return torch.cat([chunks[rank + size * part] for part in range(stride)], dim=dim)
