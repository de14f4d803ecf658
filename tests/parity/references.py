"""Random transformers models as references, their packed input, and what transformers says to it.

The configurations are spelled out field by field: nothing here goes through the exporter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

SIZES = {
    name: {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "vocab_size": 8192 if name == "nano" else 50368,
    }
    for name, layers, hidden, intermediate, heads in (
        ("nano", 4, 128, 192, 2),
        ("17m", 7, 256, 384, 4),
        ("32m", 10, 384, 576, 6),
        ("68m", 19, 512, 768, 8),
        ("150m", 22, 768, 1152, 12),
        ("400m", 28, 1024, 2624, 16),
        ("1b", 28, 1792, 3840, 28),
    )
}
#: Lengths of the packed documents: around the window of 64, past twice that, and a single token.
#: Their sum divides evenly among ranks.
DOCUMENTS = (66, 1, 200, 63, 130, 64, 65, 3)
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

    @classmethod
    def of_one(cls, tokens: torch.Tensor) -> Packed:
        """Return a stream of one document [t]."""
        borders = torch.tensor([0, len(tokens)]).int()
        return cls(tokens=tokens, cu_seqlens=borders, position_ids=torch.arange(len(tokens)))

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
    from transformers.initialization import no_init_weights

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
    with no_init_weights():
        model = model_class(config_class(**{**shape, **defaults, **fields})).eval()
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                # Keeps the scale of the input whatever the width. So attention is far from uniform
                # and shows errors, which it would not with weights as small as initial ones.
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(1.0 + 0.06 * noise)
    return model


def reference_logits(model: Any, packed: Packed) -> torch.Tensor:
    """Return [t, vocab]: each document on its own, as transformers knows no packing with sdpa."""
    with torch.inference_mode():
        return torch.cat([model(document[None]).logits[0] for document in packed.documents()])


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference as a share of the largest logit."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())
