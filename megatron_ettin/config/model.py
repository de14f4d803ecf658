"""The `model` section."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, assert_never

from megatron_ettin.config.checks import require_positive

#: The vocabulary is padded to a multiple of this. A multiple that followed the number of
#: tensor-parallel ranks would give other shapes to each layout, and so other checkpoints.
VOCAB_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture that an encoder and its decoder twin share (Ettin paper Table 1)."""

    num_layers: int
    """Number of transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of one half of the gated MLP."""
    num_attention_heads: int
    """Number of heads, each hidden_size / num_attention_heads wide; no grouped queries."""
    vocab_size: int = 50368
    """Rows of the embedding that are real tokens or published padding."""
    sliding_window: int = 64
    """Keys that a local layer sees: this many on each side (bidirectional), or this many to the
    left (causal)."""
    global_attention_every: int = 3
    """Layers 0, n, 2n, ... attend to the whole document; the others are local."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of the bias-free LayerNorms; the released code's value (the paper's table: 1e-12)."""
    init_std: float = 0.02
    """Standard deviation of the input-side weights (the released code's `full_megatron`)."""
    attention_output_dropout: float = 0.1
    """Dropout rate of attention outputs in training, as released; there is no other dropout."""
    backend: Literal["auto", "local", "transformer_engine"] = field(default="auto", compare=False)
    """Library of the linears and the attention. local: Megatron-Core and torch. auto: Transformer
    Engine in bf16 and fp8 if it is installed and there is a GPU, else local. Weights, their names
    and checkpoints are the same with each."""
    megatron_overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of Megatron-Core's TransformerConfig, set as they are given: the one escape hatch."""

    def __post_init__(self) -> None:
        """Refuse shapes that no model can have."""
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
            require_positive("model", name, getattr(self, name))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size: {self.hidden_size} is not divisible by "
                f"model.num_attention_heads: {self.num_attention_heads}"
            )
        require_positive("model", "sliding_window", self.sliding_window)
        require_positive("model", "global_attention_every", self.global_attention_every)
        if not 0.0 <= self.attention_output_dropout < 1.0:
            raise ValueError(
                f"model.attention_output_dropout: {self.attention_output_dropout} is not in [0, 1)"
            )

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix: vocab_size padded to a multiple of 64."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def uses_transformer_engine(self) -> bool | None:
        """Tell whether Transformer Engine is asked for; None leaves that to the machine."""
        match self.backend:
            case "transformer_engine":
                return True
            case "local":
                return False
            case "auto":
                return None
            case _:
                assert_never(self.backend)

    def is_global(self, layer: int) -> bool:
        """Tell whether `layer` (counted from 0) attends to whole documents."""
        return layer % self.global_attention_every == 0
