"""The Ettin model in plain PyTorch: what Megatron-Core's path is measured against.

It computes what `EttinModel` computes, with the same attention, loss and dropout, but without
Megatron-Core's layers, schedule, gradient buffers and optimizer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ettin.model.attention import PackedRows
from megatron_ettin.model.dropout import LayerDropout
from megatron_ettin.model.ettin_model import EttinModel
from megatron_ettin.model.linear_cross_entropy import linear_cross_entropy


class PlainModel(torch.nn.Module):
    """A whole model, built from the weights of one that has a single stage and rank."""

    def __init__(self, stage: EttinModel, base_global: float, base_local: float) -> None:
        """Copy the weights; attention, loss and dropout are the functions that `stage` calls."""
        super().__init__()
        self.config, self.group = stage.model_config, stage.tp_group
        self.weights = torch.nn.ParameterDict(
            {_key(name): weight.detach().clone() for name, weight in stage.named_parameters()}
        )
        self.attend = [layer.self_attention.core_attention for layer in stage.decoder.layers]
        self.dropout = stage.output_dropout
        size = self.config.head_size
        steps = torch.arange(0, size, 2, dtype=torch.float32) / size
        self.inverse_frequencies = [base**-steps for base in (base_global, base_local)]

    def forward(self, tokens: Tensor, packed: PackedRows, scored: Tensor, labels: Tensor) -> Tensor:
        """Return the summed loss of `labels` [n] at the slots `scored` [n] of tokens [t]."""
        hidden = self.hidden_states(tokens, packed)
        return self.summed_loss(hidden, scored, labels)

    def hidden_states(self, tokens: Tensor, packed: PackedRows) -> Tensor:
        """Return [t, hidden]: embedding, layers and final norm."""
        embedded = F.embedding(tokens, self._weight("embedding.word_embeddings.weight"))
        hidden = self._norm(embedded, "embedding.norm.weight")
        rotations = [self._rotation(packed, kind) for kind in (0, 1)]
        for layer in range(self.config.num_layers):
            rotation = rotations[0 if self.config.is_global(layer) else 1]
            hidden = hidden + self._attention(hidden, layer, rotation, packed)
            hidden = hidden + self._mlp(hidden, layer)
        return self._norm(hidden, "decoder.final_layernorm.weight")

    def summed_loss(self, hidden: Tensor, scored: Tensor, labels: Tensor) -> Tensor:
        """Return the loss [] of hidden states [t, hidden]."""
        dense = F.gelu(F.linear(hidden[scored], self._weight("head.dense.weight")))
        return linear_cross_entropy(
            self._norm(dense, "head.norm.weight"),
            self._weight("embedding.word_embeddings.weight"),
            self._weight("output_layer.bias"),
            labels,
            vocab_size=self.config.vocab_size,
            group=self.group,
        ).total

    def _attention(
        self, hidden: Tensor, layer: int, rotation: tuple[Tensor, Tensor], packed: PackedRows
    ) -> Tensor:
        prefix = f"decoder.layers.{layer}"
        if layer:
            hidden = self._norm(hidden, f"{prefix}.input_layernorm.weight")
        projected = F.linear(hidden, self._weight(f"{prefix}.self_attention.linear_qkv.weight"))
        heads, size = self.config.num_attention_heads, self.config.head_size
        # Megatron-Core's fused layout is [heads, (q, k, v), size], not [(q, k, v), heads, size].
        q, k, v = projected.view(len(hidden), heads, 3, size).unbind(dim=2)
        q, k, v = (x[:, None] for x in (_rotated(q, *rotation), _rotated(k, *rotation), v))
        attended = self.attend[layer](q, k, v, None, packed_seq_params=packed)[:, 0]
        output = F.linear(attended, self._weight(f"{prefix}.self_attention.linear_proj.weight"))
        if self.dropout is None:
            return output
        dropout = LayerDropout(self.dropout, layer, packed.g, packed.max_seqlen_q, 0)
        return dropout.apply(output[:, None])[:, 0]

    def _mlp(self, hidden: Tensor, layer: int) -> Tensor:
        prefix = f"decoder.layers.{layer}"
        normed = self._norm(hidden, f"{prefix}.pre_mlp_layernorm.weight")
        both = F.linear(normed, self._weight(f"{prefix}.mlp.linear_fc1.weight"))
        activated, gate = both.chunk(2, dim=-1)
        return F.linear(F.gelu(activated) * gate, self._weight(f"{prefix}.mlp.linear_fc2.weight"))

    def _rotation(self, packed: PackedRows, kind: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [t, 1, head_size] of global (0) or local (1) layers."""
        assert packed.position_ids is not None
        angles = torch.outer(packed.position_ids.float(), self.inverse_frequencies[kind])
        both = torch.cat([angles, angles], dim=-1)[:, None]
        dtype = self._weight("embedding.norm.weight").dtype
        return both.cos().to(dtype), both.sin().to(dtype)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._weight(name)
        return F.layer_norm(x, weight.shape, weight, eps=self.config.layernorm_epsilon)

    def _weight(self, name: str) -> Tensor:
        return self.weights[_key(name)]


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines


def _key(name: str) -> str:
    return name.replace(".", "/")
