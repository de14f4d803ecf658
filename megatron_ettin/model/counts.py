"""Exact counts of an Ettin model: parameters, and floating-point operations per token.

A multiply-add counts as 2. Only matmuls count: norms, activations, softmax, rotation and dropout
are left out, as is usual for model FLOPs. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from megatron_ettin.config import ModelConfig

Attention = Literal["bidirectional", "causal"]


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters by part, each counted once, without the padding of the vocabulary."""

    embedding: int
    """The token embedding, which is the output's weight too."""
    layers: int
    """The layers with their norms, the embedding's norm and the final one."""
    head: int
    """The dense layer and norm before the output, and the output's bias."""

    @property
    def backbone(self) -> int:
        """Parameters without the head, as in the Ettin paper's Table 11."""
        return self.embedding + self.layers

    @property
    def total(self) -> int:
        """All of them, as in the Ettin paper's Table 1."""
        return self.backbone + self.head


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations for a number of tokens."""

    forward: float
    backward: float
    recompute: float
    """Operations of the second forward pass through the layers, where activations are recomputed.
    The machine does them, the model does not need them: MFU leaves them out."""

    @property
    def model(self) -> float:
        """Operations that the model needs under any layout."""
        return self.forward + self.backward


def parameters(model: ModelConfig) -> Parameters:
    """Count the parameters of the whole model."""
    h = model.hidden_size
    layers = model.num_layers * layer_parameters(model) - h  # layer 0 has no attention norm
    return Parameters(
        embedding=model.vocab_size * h,
        layers=layers + 2 * h,
        head=h * h + h + model.vocab_size,
    )


def layer_parameters(model: ModelConfig) -> int:
    """Count the parameters of a layer with both of its norms."""
    return layer_matrix_parameters(model) + 2 * model.hidden_size


def layer_matrix_parameters(model: ModelConfig) -> int:
    """Count the elements of a layer's four matrices: QKV, its output, and the gated MLP's two."""
    h, f = model.hidden_size, model.ffn_hidden_size
    return 4 * h * h + 3 * h * f


def visible_pairs(lengths: ArrayLike, attention: Attention, window: int | None) -> int:
    """Count the (query, key) pairs of documents of `lengths` tokens each (one or many).

    With a `window`, query i sees the keys i - window ... i + window, or ... i if causal.
    """
    tokens = np.atleast_1d(np.asarray(lengths, dtype=np.int64))
    reach = tokens - 1 if window is None else np.minimum(window, tokens - 1)
    # Keys to the left of each query: 0, 1, ..., reach - 1, then `reach` for all that remain.
    left = reach * (reach - 1) // 2 + reach * (tokens - reach)
    return int((tokens + (left if attention == "causal" else 2 * left)).sum())


def document_flops(
    model: ModelConfig, attention: Attention, lengths: ArrayLike, scored_positions: float
) -> Flops:
    """Count the operations of training on documents of `lengths` [n] tokens each.

    A full row as one document is an upper bound for what may lie in it. `scored_positions` of the
    tokens go through the head and the output layer.
    """
    tokens = int(np.sum(lengths, dtype=np.int64))
    layers_global = sum(model.is_global(layer) for layer in range(model.num_layers))
    pairs = layers_global * visible_pairs(lengths, attention, None)
    pairs += (model.num_layers - layers_global) * visible_pairs(
        lengths, attention, model.sliding_window
    )
    h = model.hidden_size
    linear = 2.0 * tokens * model.num_layers * layer_matrix_parameters(model)
    # A pair costs a product over all heads' channels for its score and one for its value.
    layers = linear + 2.0 * 2.0 * h * pairs
    head = 2.0 * scored_positions * (h * h + h * model.vocab_size)
    # Each product has two in the backward pass: for the gradient of either factor.
    return Flops(forward=layers + head, backward=2.0 * (layers + head), recompute=layers)


def mfu(flops_per_second: float, peak_flops: float, device: str) -> float:
    """Return the model FLOPs utilization (MFU; Chowdhery et al. 2022, arXiv 2204.02311, app. B).

    Args:
        flops_per_second: `Flops.model` per second, of all devices together.
        peak_flops: peak of their dense bf16 products, of all together, whatever the precision of
            the run, so that its share can be compared with that of any other.
        device: their name, for the error.

    Raises:
        ValueError: more than the peak, which no measurement can be.
    """
    share = flops_per_second / peak_flops
    if share > 1.0:
        raise ValueError(
            f"MFU of {share:.0%} on {device}: {flops_per_second:.4g} FLOP/s are more than its bf16 "
            f"peak of {peak_flops:.4g}: the clock was read before the device was done, the "
            f"operations are counted wrongly, or the device is another than it is called"
        )
    return share


def flops_per_token(
    model: ModelConfig, attention: Attention, seq_length: int, scored_share: float
) -> Flops:
    """Count the operations per token of full rows with one document each (an upper bound)."""
    flops = document_flops(model, attention, [seq_length], scored_share * seq_length)
    return Flops(
        forward=flops.forward / seq_length,
        backward=flops.backward / seq_length,
        recompute=flops.recompute / seq_length,
    )
