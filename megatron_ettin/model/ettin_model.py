"""The Ettin model: embedding, Megatron-Core's transformer block, prediction head, tied output."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
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
from megatron_ettin.model.linear_cross_entropy import SummedLoss, linear_cross_entropy
from megatron_ettin.model.norm import LayerNorm
from megatron_ettin.model.rotary import RotaryTables

#: Suffix of the names under which modules keep state that is no weight.
EXTRA_STATE = "_extra_state"


class EttinEmbedding(MegatronModule):  # type: ignore[misc]
    """Token embedding followed by a norm; positions come in by rotation only.

    Under sequence parallelism, from the norm on a rank holds its share of the slots only.
    """

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
        self.tp_group = tp_group

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed tokens [t] -> [t, 1, hidden], or this rank's share of that."""
        embedded = self.word_embeddings(tokens[:, None])
        if self.config.sequence_parallel:
            embedded = scatter_to_sequence_parallel_region(embedded, group=self.tp_group)
        normed: torch.Tensor = self.norm(embedded)
        return normed


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
    """One pipeline stage of an Ettin model; only the spec's attention mask knows the objective."""

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
        # Megatron-Core's finalize_model_grads reads this attribute of every model.
        self.model_type = None
        if pre_process:
            self.embedding = EttinEmbedding(config, model.padded_vocab_size, self.tp_group)
        self.decoder = TransformerBlock(
            config=config, spec=spec, pre_process=pre_process, post_process=post_process
        )
        if post_process:
            # The head gets the scored slots only, and every tensor-parallel rank holds all of them:
            # so it is replicated, not sequence-parallel.
            replicated = copy.copy(config)
            replicated.sequence_parallel = False
            # ColumnParallelLinear can fuse it with apex only, which may be absent.
            replicated.gradient_accumulation_fusion = False
            self.head = PredictionHead(replicated)
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                model.padded_vocab_size,
                config=replicated,
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
        self.rotary = RotaryTables(self.config, base_global, base_local)

    def set_input_tensor(self, input_tensor: list[torch.Tensor]) -> None:
        """Take the previous stage's output (called by Megatron-Core's schedules)."""
        self.decoder.set_input_tensor(input_tensor[0])

    def forward(
        self,
        tokens: torch.Tensor,
        packed: PackedRows,
        scored: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor | SummedLoss:
        """Run the stage over this context-parallel rank's t slots of a stream.

        Args:
            tokens: [t] int64 input ids.
            packed: the stream's segments and positions.
            scored: [n] int64 slots, of these t, to predict from; all if not given.
            labels: [n] int64 tokens predicted at `scored`.
            weights: [n] float32 factors of the losses there; 1 if not given.

        Returns:
            Not the last stage: hidden states [t, 1, hidden], divided among tensor-parallel ranks
            under sequence parallelism. Last stage: the loss if `labels` is given, else logits
            [n, vocab_size] gathered over tensor-parallel ranks.
        """
        if self.training:
            packed = dataclasses.replace(packed, dropout=self.output_dropout)
        hidden = self.decoder(
            hidden_states=self.embedding(tokens) if self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=self.rotary.of(packed),
            packed_seq_params=packed,
        )
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # From here all ranks compute the same, so their gradients are equal: each keeps its
            # slice, and nothing is reduced.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        if scored is not None:
            hidden = hidden.index_select(0, scored)
        if labels is not None:
            return linear_cross_entropy(
                self.head(hidden)[:, 0],
                self.shared_embedding_or_output_weight(),
                self.output_layer.bias,
                labels,
                weights=weights,
                vocab_size=self.model_config.vocab_size,
                group=self.tp_group,
            )
        logits, _ = self.output_layer(
            self.head(hidden), weight=self.shared_embedding_or_output_weight()
        )
        gathered: torch.Tensor = gather_from_tensor_model_parallel_region(
            logits, group=self.tp_group
        )
        return gathered[:, 0, : self.model_config.vocab_size]

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layout-free description of the weights for `dist_checkpointing`.

        `_extra_state` is left out, because it would tie a checkpoint to the backend that wrote it.
        It holds the amax history of the fp8 recipe "delayed" only, which fills again in a few
        steps.
        """
        state = super().sharded_state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.endswith(EXTRA_STATE)}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights; the modules keep their `_extra_state`, which no checkpoint holds."""
        own = {key: value for key, value in self.state_dict().items() if key.endswith(EXTRA_STATE)}
        return super().load_state_dict({**own, **state_dict}, strict=strict, assign=assign)
