"""The table of names and layouts, against transformers' own models and loops over single rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertForMaskedLM,
)

from megatron_ettin.config import ModelConfig
from megatron_ettin.model import weight_map
from megatron_ettin.model.weight_map import Architecture

MODELS = sorted((Path(__file__).parents[2] / "examples" / "model").glob("*.yaml"))
SMALL = ModelConfig(
    num_layers=3, hidden_size=6, ffn_hidden_size=4, num_attention_heads=3, vocab_size=70
)
CLASSES: dict[Architecture, tuple[Any, Any]] = {
    "encoder": (ModernBertConfig, ModernBertForMaskedLM),
    "decoder": (ModernBertDecoderConfig, ModernBertDecoderForCausalLM),
}


def their_shapes(model: ModelConfig, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the tensors that transformers saves for a model of this shape."""
    config_class, model_class = CLASSES[architecture]
    with torch.device("meta"):
        theirs = model_class(
            config_class(
                vocab_size=model.vocab_size,
                hidden_size=model.hidden_size,
                intermediate_size=model.ffn_hidden_size,
                num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_attention_heads,
                pad_token_id=0,
            )
        )
    return {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}


def our_shapes(model: ModelConfig, architecture: Architecture) -> list[tuple[str, tuple[int, ...]]]:
    """Return the tensors of the table, one by one."""
    shapes = []
    for entry in weight_map.entries(model.num_layers).values():
        whole = torch.empty(weight_map.huggingface_shape(entry, model), device="meta")
        names = weight_map.huggingface_names(entry, architecture)
        parts = whole.chunk(len(names))
        shapes += [(name, tuple(part.shape)) for name, part in zip(names, parts, strict=True)]
    return shapes


@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_tensor_has_one_entry(path: Path, architecture: Architecture) -> None:
    model = ModelConfig(**yaml.safe_load(path.read_text())["model"])
    shapes = our_shapes(model, architecture)
    assert dict(shapes) == their_shapes(model, architecture)
    assert len(shapes) == len(dict(shapes))


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def test_query_key_value_rows() -> None:
    """Here by head, then by part; there by part (query, key, value), then by head."""
    entry = weight_map.entries(3)["decoder.layers.1.self_attention.linear_qkv.weight"]
    theirs = numbered((18, 6))
    ours = weight_map.from_huggingface(entry, theirs, SMALL)
    for part in range(3):
        for head in range(3):
            for channel in range(2):
                row, their_row = head * 6 + part * 2 + channel, part * 6 + head * 2 + channel
                assert torch.equal(ours[row], theirs[their_row])


@pytest.mark.parametrize("name", ["embedding.word_embeddings.weight", "output_layer.bias"])
def test_vocabulary_is_padded_with_zeros(name: str) -> None:
    entry = weight_map.entries(3)[name]
    theirs = numbered(weight_map.huggingface_shape(entry, SMALL)) + 1.0
    ours = weight_map.from_huggingface(entry, theirs, SMALL)
    assert ours.shape[0] == 128
    assert torch.equal(ours[:70], theirs)
    assert not ours[70:].any()


@pytest.mark.parametrize("name", weight_map.entries(SMALL.num_layers))
def test_both_ways_is_the_identity(name: str) -> None:
    entry = weight_map.entries(SMALL.num_layers)[name]
    theirs = numbered(weight_map.huggingface_shape(entry, SMALL))
    ours = weight_map.from_huggingface(entry, theirs, SMALL)
    assert torch.equal(weight_map.to_huggingface(entry, ours, SMALL), theirs)


def test_layer_0_has_no_attention_norm() -> None:
    names = weight_map.entries(2)
    assert "decoder.layers.0.input_layernorm.weight" not in names
    assert "decoder.layers.1.input_layernorm.weight" in names
