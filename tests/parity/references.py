"""Random transformers models as references, their packed input, and what both sides say to it.

The configurations are spelled out field by field: nothing here goes through the exporter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ettin import checkpoint, distributed
from megatron_ettin.config import HardwareConfig, SeedConfig
from megatron_ettin.model.attention import PackedRows
from megatron_ettin.model.provider import build_model

NANO = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "vocab_size": 8192,
}
ETTIN_17M = {
    "num_hidden_layers": 7,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "vocab_size": 50368,
}
#: Lengths of the packed documents: around the window of 64, past twice that, and a single token.
DOCUMENTS = (66, 1, 200, 63, 130, 64, 65)
KINDS = ("encoder", "decoder")
#: `local_attention` with which transformers sees 64 keys away.
AS_TRAINED = {"encoder": 128, "decoder": 130}
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Packed:
    """A stream of documents without padding."""

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    position_ids: torch.Tensor

    @classmethod
    def random(cls, vocab_size: int, lengths: tuple[int, ...] = DOCUMENTS) -> Packed:
        generator = torch.Generator().manual_seed(5)
        borders = torch.tensor([0, *lengths]).cumsum(0)
        return cls(
            tokens=torch.randint(0, vocab_size, (sum(lengths),), generator=generator),
            cu_seqlens=borders.int(),
            position_ids=torch.cat([torch.arange(length) for length in lengths]),
        )

    def documents(self) -> list[torch.Tensor]:
        return list(self.tokens.split(self.cu_seqlens.diff().tolist()))


def make_reference(kind: str, shape: dict[str, int], seed: int = 11, **fields: Any) -> Any:
    """Build a transformers model with every weight random, norms and bias included."""
    # Not above: the ranks use this module too, and do without transformers' seconds of import.
    from transformers import (
        ModernBertConfig,
        ModernBertDecoderConfig,
        ModernBertDecoderForCausalLM,
        ModernBertForMaskedLM,
    )

    is_encoder = kind == "encoder"
    config_class = ModernBertConfig if is_encoder else ModernBertDecoderConfig
    model_class = ModernBertForMaskedLM if is_encoder else ModernBertDecoderForCausalLM
    top = shape["vocab_size"]
    defaults: dict[str, Any] = {
        "local_attention": AS_TRAINED[kind],
        "global_rope_theta": 160_000.0,
        "local_rope_theta": 10_000.0,
        "max_position_embeddings": 512,
        "pad_token_id": top - 2,
        "bos_token_id": top - 4,
        "cls_token_id": top - 4,
        "eos_token_id": top - 3,
        "sep_token_id": top - 3,
        "attn_implementation": "sdpa",
    }
    model = model_class(config_class(**{**shape, **defaults, **fields})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than initial weights, so that attention is far from uniform and shows errors.
            noise = torch.randn(parameter.shape, generator=generator) * 0.06
            parameter.copy_(noise if parameter.dim() > 1 else noise + 1.0)
    return model


def reference_logits(model: Any, packed: Packed) -> torch.Tensor:
    """Return [t, vocab]: each document on its own, as transformers knows no packing with sdpa."""
    with torch.inference_mode():
        return torch.cat([model(document[None]).logits[0] for document in packed.documents()])


def stage_logits(stage: Any, packed: Packed) -> torch.Tensor:
    """Return [t, vocab] of a whole or tensor-parallel model here, on the packed stream."""
    layout = PackedRows.of(
        packed.cu_seqlens, max(DOCUMENTS), packed.position_ids, g=torch.tensor([0])
    )
    with torch.inference_mode():
        logits: torch.Tensor = stage(packed.tokens, layout)
    return logits


def load_stage(folder: Path, hardware: HardwareConfig) -> Any:
    """Return this rank's stage of the model in a checkpoint; needs process groups."""
    saved = checkpoint.read_model(folder)
    stage = build_model(saved.model, saved.attention, hardware, SeedConfig()).eval()
    checkpoint.load(folder, stage, None, saved.model)
    stage.set_rotary_bases(saved.rotary_base_global, saved.rotary_base_local)
    return stage


def checkpoint_logits(folder: Path, packed: Packed) -> torch.Tensor:
    """Return [t, vocab] of the model in a checkpoint, in this process alone."""
    with distributed.process_groups(HardwareConfig()):
        return stage_logits(load_stage(folder, HardwareConfig()), packed)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference as a share of the largest logit."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())
