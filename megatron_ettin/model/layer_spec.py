"""The layer recipe as a Megatron-Core spec: norms, gated MLP, local/global, RoPE per kind.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_ettin.model.attention import CoreAttention, KindAndLength, PackedRows
from megatron_ettin.model.backend import Backend, Linears, core_attention, linears
from megatron_ettin.model.dropout import LayerDropout
from megatron_ettin.model.norm import LayerNorm
from megatron_ettin.model.rotary import rotated


class GatedGelu(MegatronModule):  # type: ignore[misc]
    """Exact GELU (by erf, as in ModernBERT) of one half of the channels, times the other half.

    A GPU runs one kernel forward and one backward. A CPU runs two plain operations: a fused one
    would keep the input only and compute the GELU twice, which took 1.2 to 1.4 times as long.
    """

    def forward(self, gated: torch.Tensor) -> torch.Tensor:
        """Return gelu(x) * gate for gated [t, 1, 2 f] = [x, gate]: [t, 1, f]."""
        if gated.is_cuda:
            from megatron_ettin.model.gated_gelu_triton import gated_gelu

            return gated_gelu(gated)
        x, gate = gated.chunk(2, dim=-1)
        return torch.nn.functional.gelu(x) * gate


class EttinSelfAttention(SelfAttention):  # type: ignore[misc]
    """Self-attention that rotates queries and keys where the projection has written them."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        rotary_pos_emb: torch.Tensor,
        packed_seq_params: PackedRows,
    ) -> tuple[torch.Tensor, None]:
        """Attend and project: [t, 1, hidden] -> ([t, 1, hidden], no bias).

        `rotary_pos_emb` is the table of the layer's kind. Under sequence parallelism input and
        output are this tensor-parallel rank's share of the slots.
        """
        projected, _ = self.linear_qkv(hidden_states)
        heads, size = self.num_attention_heads_per_partition, self.hidden_size_per_attention_head
        qkv = projected.view(len(projected), 1, heads, 3, size)
        query, key, value = rotated(qkv, rotary_pos_emb, packed_seq_params, self.config)
        attended = self.core_attention(
            query, key, value, attention_mask, packed_seq_params=packed_seq_params
        )
        output, bias = self.linear_proj(attended)
        return output, bias


class EttinLayer(TransformerLayer):  # type: ignore[misc]
    """A pre-norm layer whose additions are one operation with the norms after them.

    The norm after the MLP's addition is in the next layer. So a layer hands the two summands over,
    the second one as Megatron-Core's `context`. The last layer of a stage adds them itself, and so
    does every layer that is computed again in the backward pass, which would keep both.
    """

    def __init__(self, *args: Any, is_last: bool, **kwargs: Any) -> None:
        """Build a layer; `is_last` is True for the last one of a pipeline stage."""
        super().__init__(*args, **kwargs)
        self.hands_over = not is_last and self.config.recompute_granularity is None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        *,
        rotary_pos_emb: torch.Tensor,
        packed_seq_params: PackedRows,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer: [t, 1, hidden], and what is to be added if not None, to the same.

        `rotary_pos_emb` [2 (global, local), ...] has the tables of both kinds.
        """
        if context is None:
            residual, normed = hidden_states, self.input_layernorm(hidden_states)
        else:
            residual, normed = self.input_layernorm.of_sum(hidden_states, context)
        is_local = self.config.window_attn_skip_freq[self.layer_number - 1]
        attended, _ = self.self_attention(
            normed,
            attention_mask,
            rotary_pos_emb=rotary_pos_emb[is_local],
            packed_seq_params=packed_seq_params,
        )
        dropout = self._dropout(packed_seq_params, len(attended))
        residual, normed = self.pre_mlp_layernorm.of_sum(residual, attended, dropout)
        output, _ = self.mlp(normed)
        return (residual, output) if self.hands_over else (residual + output, None)

    def _dropout(self, packed: PackedRows, slots: int) -> LayerDropout | None:
        """Return the dropout of the attention's output, of which this rank holds `slots` slots."""
        if packed.dropout is None:
            return None
        first_slot = packed.first_slot
        if self.config.sequence_parallel:
            first_slot += self.pg_collection.tp.rank() * slots
        return LayerDropout(
            packed.dropout, self.layer_number - 1, packed.g, packed.max_seqlen_q, first_slot
        )


def block_spec(
    config: TransformerConfig,
    mask_type: AttnMaskType,
    layers: range,
    backend: Backend,
    by_engine: frozenset[KindAndLength] = frozenset(),
) -> TransformerBlockSubmodules:
    """Return the spec of the layers `layers` (counted from 0) that a pipeline stage holds.

    Transformer Engine computes the attention of the kinds `by_engine`, over rows of these lengths.
    """
    return TransformerBlockSubmodules(
        layer_specs=[
            _layer_spec(
                mask_type,
                linears(backend),
                core_attention(config, layer + 1, by_engine),
                has_input_norm=layer > 0,
                is_last=layer == layers[-1],
            )
            for layer in layers
        ],
        layer_norm=LayerNorm,
    )


def _layer_spec(
    mask_type: AttnMaskType,
    linear: Linears,
    core: Callable[..., CoreAttention],
    *,
    has_input_norm: bool,
    is_last: bool,
) -> ModuleSpec:
    # Layer 0 has no attention norm: the embedding is normalised already (ModernBERT's
    # skip_first_prenorm).
    return ModuleSpec(
        module=EttinLayer,
        params={"is_last": is_last},
        submodules=TransformerLayerSubmodules(
            input_layernorm=LayerNorm if has_input_norm else IdentityOp,
            self_attention=ModuleSpec(
                module=EttinSelfAttention,
                params={"attn_mask_type": mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear.column, core_attention=core, linear_proj=linear.row
                ),
            ),
            pre_mlp_layernorm=LayerNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=linear.column,
                    linear_fc2=linear.row,
                    activation_func=GatedGelu,
                ),
            ),
        ),
    )
