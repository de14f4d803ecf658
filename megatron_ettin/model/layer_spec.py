"""The layer recipe as a Megatron-Core spec: norms, gated MLP, local/global, RoPE per kind.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_ettin.model.attention import CoreAttention, PackedRows
from megatron_ettin.model.backend import Backend, Linears, core_attention, linears


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm without bias, as Megatron-Core builds norms (its own always carry one)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        """Build the norm over the last dimension [..., hidden_size]."""
        super().__init__(hidden_size, eps=eps, bias=False, dtype=config.params_dtype)
        # Under sequence parallelism Megatron-Core all-reduces gradients of parameters marked so.
        cast(Any, self.weight).sequence_parallel = config.sequence_parallel


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
    """Self-attention whose output is dropped by counters while training."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: PackedRows,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend and project: [t, 1, hidden] -> ([t, 1, hidden], no bias).

        Under sequence parallelism both are this tensor-parallel rank's share of the slots.
        """
        output, bias = super().forward(
            hidden_states, attention_mask, packed_seq_params=packed_seq_params, **kwargs
        )
        if packed_seq_params.dropout is not None:
            first_slot = packed_seq_params.first_slot
            if self.config.sequence_parallel:
                first_slot += self.pg_collection.tp.rank() * len(output)
            output = packed_seq_params.dropout.apply(
                output,
                packed_seq_params.g,
                packed_seq_params.max_seqlen_q,
                self.layer_number - 1,
                first_slot,
            )
        return output, bias


class EttinLayer(TransformerLayer):  # type: ignore[misc]
    """A pre-norm layer that picks the rotary table of its kind."""

    def forward(
        self, hidden_states: torch.Tensor, *, rotary_pos_emb: torch.Tensor, **kwargs: Any
    ) -> Any:
        """Run the layer; `rotary_pos_emb` is [2 (global, local), t, 1, 1, head_size]."""
        is_local = self.config.window_attn_skip_freq[self.layer_number - 1]
        return super().forward(hidden_states, rotary_pos_emb=rotary_pos_emb[is_local], **kwargs)


def block_spec(
    config: TransformerConfig, mask_type: AttnMaskType, layers: range, backend: Backend
) -> TransformerBlockSubmodules:
    """Return the spec of the layers `layers` (counted from 0) that a pipeline stage holds."""
    return TransformerBlockSubmodules(
        layer_specs=[
            _layer_spec(
                mask_type,
                linears(backend),
                core_attention(backend, config, mask_type, layer + 1),
                has_input_norm=layer > 0,
            )
            for layer in layers
        ],
        layer_norm=LayerNorm,
    )


def _layer_spec(
    mask_type: AttnMaskType, linear: Linears, core: type[CoreAttention], *, has_input_norm: bool
) -> ModuleSpec:
    # Layer 0 has no attention norm: the embedding is normalised already (ModernBERT's
    # skip_first_prenorm).
    return ModuleSpec(
        module=EttinLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=LayerNorm if has_input_norm else IdentityOp,
            self_attention=ModuleSpec(
                module=EttinSelfAttention,
                params={"attn_mask_type": mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear.column, core_attention=core, linear_proj=linear.row
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=LayerNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=linear.column,
                    linear_fc2=linear.row,
                    activation_func=GatedGelu,
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
