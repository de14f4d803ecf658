"""The Ettin model: embedding, Megatron-Core's transformer block, prediction head, tied output."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    gather_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup

from megatron_ettin.config import ModelConfig
from megatron_ettin.model.attention import PackedRows
from megatron_ettin.model.dropout import OutputDropout
from megatron_ettin.model.layer_spec import LayerNorm


class EttinEmbedding(MegatronModule):  # type: ignore[misc]
    """Token embedding followed by a norm; positions come in by rotation only."""

    def __init__(
        self, config: TransformerConfig, padded_vocab_size: int, tp_group: ProcessGroup
    ) -> None:
        """Build the vocabulary-parallel table [padded_vocab_size, hidden] and its norm."""
        super().__init__(config=config)
        self.word_embeddings = VocabParallelEmbedding(
            num_embeddings=padded_vocab_size,
            embedding_dim=config.hidden_size,
            init_method=config.init_method,
            config=config,
            tp_group=tp_group,
        )
        self.norm = LayerNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed tokens [t] -> [t, 1, hidden]."""
        embedded: torch.Tensor = self.norm(self.word_embeddings(tokens[:, None]))
        return embedded


class PredictionHead(MegatronModule):  # type: ignore[misc]
    """BERT's head, for both objectives: norm(gelu(dense(x))), without biases."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build the dense layer [hidden, hidden] and its norm, replicated over tensor ranks."""
        super().__init__(config=config)
        width = config.hidden_size
        self.dense = torch.nn.Linear(width, width, bias=False, dtype=config.params_dtype)
        self.norm = LayerNorm(config, width, config.layernorm_epsilon)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Transform hidden [n, 1, hidden] to the space of the embedding."""
        transformed: torch.Tensor = self.norm(torch.nn.functional.gelu(self.dense(hidden)))
        return transformed


class EttinModel(LanguageModule):  # type: ignore[misc]
    """One pipeline stage of an Ettin encoder or decoder; which of the two, only the spec knows."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        spec: TransformerBlockSubmodules,
        *,
        pre_process: bool,
        post_process: bool,
        dropout_seed: int,
    ) -> None:
        """Build the stage; the first holds the embedding, the last the head and the tied output."""
        super().__init__(config=config)
        self.model_config = model
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = True
        rate = model.attention_output_dropout
        self.output_dropout = OutputDropout(rate, dropout_seed) if rate else None
        # Megatron-Core's gradient finalisation asks every model for this.
        self.model_type = None
        if pre_process:
            self.embedding = EttinEmbedding(config, model.padded_vocab_size, self.tp_group)
        self.decoder = TransformerBlock(
            config=config, spec=spec, pre_process=pre_process, post_process=post_process
        )
        if post_process:
            self.head = PredictionHead(config)
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                model.padded_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=True,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process,
                tp_group=self.tp_group,
            )
        self.set_rotary_bases(10_000.0, 10_000.0)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_rotary_bases(self, base_global: float, base_local: float) -> None:
        """Set the RoPE bases of the global and the local layers (they change between phases)."""
        self.rotary = [
            RotaryEmbedding(
                kv_channels=self.config.kv_channels,
                rotary_percent=1.0,
                rotary_base=base,
                use_cpu_initialization=not torch.cuda.is_available(),
            )
            for base in (base_global, base_local)
        ]

    def set_input_tensor(self, input_tensor: list[torch.Tensor]) -> None:
        """Take the previous stage's output [t, 1, hidden] (called by Megatron-Core's schedules)."""
        self.decoder.set_input_tensor(input_tensor[0])

    def forward(
        self,
        tokens: torch.Tensor,
        packed: PackedRows,
        scored: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the stage over a stream of t slots.

        Args:
            tokens: [t] int64 input ids.
            packed: the stream's segments and positions.
            scored: [n] int64 slots to predict from; all slots if not given.
            labels: [n] int64 tokens predicted at `scored`.

        Returns:
            Not the last stage: hidden states [t, 1, hidden]. Last stage: the loss [n] float32 if
            `labels` is given, else logits [n, vocab_size] gathered over tensor-parallel ranks.
        """
        if self.training:
            packed = dataclasses.replace(packed, dropout=self.output_dropout)
        hidden = self.decoder(
            hidden_states=self.embedding(tokens) if self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=self._rotary_tables(packed),
            packed_seq_params=packed,
        )
        if not self.post_process:
            return hidden
        if scored is not None:
            hidden = hidden.index_select(0, scored)
        logits = self._logits(hidden)
        if labels is None:
            gathered: torch.Tensor = gather_from_tensor_model_parallel_region(
                logits, group=self.tp_group
            )
            return gathered[:, 0, : self.model_config.vocab_size]
        loss: torch.Tensor = vocab_parallel_cross_entropy(logits.float(), labels[:, None])
        return loss[:, 0]

    def _rotary_tables(self, packed: PackedRows) -> torch.Tensor:
        """Return [2, t, 1, 1, head_size]: angles by position, for global and local layers."""
        tables = [rotary(packed.max_seqlen_q)[packed.position_ids] for rotary in self.rotary]
        return torch.stack(tables)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return this rank's columns [n, 1, padded_vocab / tp]; padded columns are -inf."""
        weight = self.shared_embedding_or_output_weight()
        logits, _ = self.output_layer(self.head(hidden), weight=weight)
        columns = logits.shape[-1]
        first = self.tp_group.rank() * columns
        real = min(max(self.model_config.vocab_size - first, 0), columns)
        if real < columns:
            logits = torch.cat(
                [logits[..., :real], torch.full_like(logits[..., real:], float("-inf"))], dim=-1
            )
        return logits

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layout-free description of the weights for `dist_checkpointing`."""
        state = super().sharded_state_dict(*args, **kwargs)
        # The block's `_extra_state` entries hold nothing without Transformer Engine, and would tie
        # a checkpoint to the backend that wrote it.
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}
