"""Small random models in Hugging Face form, with the tokenizer of the tiny corpus."""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertForMaskedLM,
)

from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.export.tokenizer import write_tokenizer

Kind = Literal["encoder", "decoder"]
CLASSES: dict[Kind, Any] = {
    "encoder": (ModernBertConfig, ModernBertForMaskedLM),
    "decoder": (ModernBertDecoderConfig, ModernBertDecoderForCausalLM),
}


def write_random_model(
    folder: Path,
    kind: Kind,
    tokenizer_folder: Path,
    *,
    seed: int = 0,
    prediction_shift: int = 0,
    max_tokens: int = 128,
    hidden_size: int = 64,
) -> Path:
    """Write a model of four layers (global, local, local, global) that tools/convert.py could have.

    Its weights are large enough that its predictions depend on what it reads.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    config_class, model_class = CLASSES[kind]
    pooling = {"classifier_pooling": "mean"} if kind == "encoder" else {}
    config = config_class(
        vocab_size=tokenizer.ids.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size + hidden_size // 2,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=max_tokens,
        local_attention=8,
        layer_types=["full_attention", *2 * ["sliding_attention"], "full_attention"],
        pad_token_id=tokenizer.ids.pad,
        bos_token_id=tokenizer.ids.cls,
        eos_token_id=tokenizer.ids.sep,
        cls_token_id=tokenizer.ids.cls,
        sep_token_id=tokenizer.ids.sep,
        initializer_range=0.2,
        decoder_bias=True,
        tie_word_embeddings=True,
        **pooling,
    )
    if prediction_shift:
        config.prediction_shift = prediction_shift
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model_class(config).save_pretrained(folder)
    write_tokenizer(tokenizer, folder, architecture=kind, max_length=max_tokens)
    return folder
