"""Table of Megatron-Core names and ModernBERT names, read both ways, and the two row layouts.

Hugging Face keeps Q, K and V as three blocks of [heads, head_size] rows; Megatron-Core interleaves
them by head. The gated MLP has the same row order on both sides: the first half is activated.
Vocabulary tensors are padded to `ModelConfig.padded_vocab_size` on our side only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_ettin.config import ModelConfig

Architecture = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Entry:
    """One logical tensor; `{i}` stands for the layer."""

    ours: str
    encoder: str
    decoder: str | None = None
    """Name in the decoder, if it differs; "{x}" stands for q, k and v."""
    layout: Literal["plain", "vocabulary", "qkv"] = "plain"
    init: Literal["in", "out", "norm", "bias"] = "in"
    """Initial values ("full_megatron"), in this order: deviation 0.02; deviation
    0.02 / sqrt(2 * layers); ones; uniform in [-1/sqrt(H), 1/sqrt(H)]."""
    skip_layer_0: bool = False


_LAYER, _HF_LAYER = "decoder.layers.{i}.", "model.layers.{i}."
LAYER_ENTRIES = (
    Entry(
        _LAYER + "input_layernorm.weight",
        _HF_LAYER + "attn_norm.weight",
        init="norm",
        skip_layer_0=True,
    ),
    Entry(
        _LAYER + "self_attention.linear_qkv.weight",
        _HF_LAYER + "attn.Wqkv.weight",
        _HF_LAYER + "attn.{x}_proj.weight",
        layout="qkv",
    ),
    Entry(_LAYER + "self_attention.linear_proj.weight", _HF_LAYER + "attn.Wo.weight", init="out"),
    Entry(_LAYER + "pre_mlp_layernorm.weight", _HF_LAYER + "mlp_norm.weight", init="norm"),
    Entry(_LAYER + "mlp.linear_fc1.weight", _HF_LAYER + "mlp.Wi.weight"),
    Entry(_LAYER + "mlp.linear_fc2.weight", _HF_LAYER + "mlp.Wo.weight", init="out"),
)
FIRST_ENTRIES = (
    Entry(
        "embedding.word_embeddings.weight",
        "model.embeddings.tok_embeddings.weight",
        layout="vocabulary",
    ),
    Entry("embedding.norm.weight", "model.embeddings.norm.weight", init="norm"),
)
LAST_ENTRIES = (
    Entry("decoder.final_layernorm.weight", "model.final_norm.weight", init="norm"),
    Entry("head.dense.weight", "head.dense.weight", "lm_head.dense.weight"),
    Entry("head.norm.weight", "head.norm.weight", "lm_head.norm.weight", init="norm"),
    Entry("output_layer.bias", "decoder.bias", layout="vocabulary", init="bias"),
)


def entries(num_layers: int) -> dict[str, Entry]:
    """Return every logical tensor of a model by its name here, layers filled in."""
    table = list(FIRST_ENTRIES)
    for layer in range(num_layers):
        for entry in LAYER_ENTRIES:
            if not (entry.skip_layer_0 and layer == 0):
                table.append(_of_layer(entry, layer))
    table.extend(LAST_ENTRIES)
    return {entry.ours: entry for entry in table}


def _of_layer(entry: Entry, layer: int) -> Entry:
    def fill(name: str) -> str:
        return name.replace("{i}", str(layer))

    decoder = fill(entry.decoder) if entry.decoder is not None else None
    return Entry(
        fill(entry.ours), fill(entry.encoder), decoder, entry.layout, entry.init, entry.skip_layer_0
    )


def huggingface_names(entry: Entry, architecture: Architecture) -> list[str]:
    """Return the Hugging Face tensors that make up `entry`, in row order."""
    name: str = getattr(entry, architecture) or entry.encoder
    return [name.replace("{x}", x) for x in "qkv"] if "{x}" in name else [name]


def huggingface_shape(entry: Entry, model: ModelConfig) -> tuple[int, ...]:
    """Return the shape of `entry` with Hugging Face's rows (Q, K and V in one tensor)."""
    h, f = model.hidden_size, model.ffn_hidden_size
    if entry.init == "norm":
        return (h,)
    if entry.layout == "vocabulary":
        return (model.vocab_size,) if entry.init == "bias" else (model.vocab_size, h)
    if entry.layout == "qkv":
        return (3 * h, h)
    if entry.ours.endswith("linear_fc1.weight"):
        return (2 * f, h)
    if entry.ours.endswith("linear_fc2.weight"):
        return (h, f)
    return (h, h)


def from_huggingface(entry: Entry, tensor: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Return `tensor` (Hugging Face rows, `huggingface_shape`) with Megatron-Core's rows."""
    if entry.layout == "qkv":
        # [3, heads, size, hidden] -> [heads, 3, size, hidden]
        blocks = tensor.view(3, model.num_attention_heads, model.head_size, model.hidden_size)
        return blocks.transpose(0, 1).reshape(3 * model.hidden_size, model.hidden_size)
    if entry.layout == "vocabulary":
        padding = model.padded_vocab_size - model.vocab_size
        return torch.cat([tensor, tensor.new_zeros((padding, *tensor.shape[1:]))])
    return tensor


def to_huggingface(entry: Entry, tensor: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Return `tensor` (Megatron-Core rows, not sharded) with Hugging Face's rows."""
    if entry.layout == "qkv":
        # [heads, 3, size, hidden] -> [3, heads, size, hidden]
        heads = tensor.view(model.num_attention_heads, 3, model.head_size, model.hidden_size)
        return heads.transpose(0, 1).reshape(3 * model.hidden_size, model.hidden_size)
    if entry.layout == "vocabulary":
        return tensor[: model.vocab_size]
    return tensor
