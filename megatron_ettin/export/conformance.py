"""Conformance pack: tiny models, inputs, expected outputs of every layer, a program that compares.

The expected outputs are those of transformers' own modules on a CPU, in float32.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_ettin.checkpoint import SavedModel
from megatron_ettin.config import ModelConfig
from megatron_ettin.export.architecture import KINDS, ModelKind, huggingface_config
from megatron_ettin.export.huggingface import check_free
from megatron_ettin.native import Purpose, counter_draws, counter_key, initial_weights
from megatron_ettin.publication import begin_folder, publish_folder

SEED = 21
WINDOW = 16
MODEL = ModelConfig(
    num_layers=5,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    vocab_size=160,
    sliding_window=WINDOW,
)
#: Tokens whose embedding is so small that the epsilon of its norm decides the result.
TINY_TOKENS = range(128, 150)
PAD = 159
#: Lengths of the documents of each row; a batch of several rows is padded.
LENGTHS = {
    **{f"length_{length}": ((length,),) for length in (1, 2, 16, 17, 18, 33, 34, 200)},
    "tiny_activations": ((12,),),
    "padded_right": ((7,), (40,), (23,)),
    "padded_left": ((7,), (40,), (23,)),
    "packed": ((30, 45, 25),),
}


def write_pack(output: Path) -> None:
    """Write the pack, a folder that appears when complete.

    Raises:
        ValueError: something is at `output` already.
    """
    check_free(output)
    unfinished = begin_folder(output)
    inputs = make_inputs()
    for kind in KINDS:
        folder = unfinished / kind.architecture
        model = make_model(kind)
        model.save_pretrained(folder)
        save_file(inputs, folder / "inputs.safetensors")
        save_file(run(model, inputs), folder / "expected.safetensors")
    shutil.copyfile(Path(__file__).with_name("conformance_check.py"), unfinished / "check.py")
    (unfinished / "README.md").write_text(README, encoding="utf-8")
    publish_folder(output)


def make_inputs() -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask and document, [rows, slots] int64 each, by case."""
    tensors: dict[str, torch.Tensor] = {}
    for number, (case, rows) in enumerate(LENGTHS.items()):
        shape = len(rows), max(map(sum, rows))
        tokens = TINY_TOKENS if case == "tiny_activations" else range(TINY_TOKENS.start)
        key = counter_key(SEED, Purpose.PERMUTATION, [number])
        draws = counter_draws(key, 0, shape[0] * shape[1])
        drawn = (draws % np.uint64(len(tokens))).astype(np.int64) + tokens.start
        mask = torch.zeros(shape, dtype=torch.int64)
        document = torch.zeros(shape, dtype=torch.int64)
        for row, lengths in enumerate(rows):
            begin = shape[1] - sum(lengths) if case == "padded_left" else 0
            mask[row, begin : begin + sum(lengths)] = 1
            for index, length in enumerate(lengths):
                document[row, begin : begin + length] = index
                begin += length
        ids = torch.from_numpy(drawn.reshape(shape)).where(mask == 1, torch.tensor(PAD))
        named = {"input_ids": ids, "attention_mask": mask, "document": document}
        tensors |= {f"{case}/{name}": value for name, value in named.items()}
    return tensors


def make_model(kind: ModelKind) -> Any:
    """Return a transformers model whose weights follow from SEED and their names alone."""
    saved = SavedModel(
        model=MODEL,
        attention=kind.attention,
        rotary_base_global=160_000.0,
        rotary_base_local=10_000.0,
        max_seq_length=256,
        tokenizer=None,
    )
    ids = {"cls_token_id": 155, "bos_token_id": 155, "sep_token_id": 156, "eos_token_id": 156}
    model = kind.model_class(huggingface_config(saved, {**ids, "pad_token_id": PAD})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = initial_weights(name, SEED, 0, parameter.numel(), std=1.0)
            noise = torch.from_numpy(drawn).view(parameter.shape)
            if name.endswith("decoder.bias"):
                parameter.copy_(noise)
            elif parameter.dim() == 1:
                parameter.copy_(1.0 + 0.4 * noise)
            else:
                # Keeps the scale of the input, so that attention weights are far from uniform and
                # a wrong mask shows in the outputs.
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
        embedding = model.get_input_embeddings().weight
        embedding[TINY_TOKENS.start : TINY_TOKENS.stop] *= 0.01
    return model


def run(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the output [rows, slots, channels] of each module by case; zeros at padding.

    Documents that share a row are computed one by one, because positions and attention restart.
    """
    body = model.model
    modules = {"embeddings": body.embeddings}
    modules |= {f"layers.{i}": layer for i, layer in enumerate(body.layers)}
    modules |= {
        "final_norm": body.final_norm,
        "head": getattr(model, "lm_head", None) or model.head,
    }
    modules["logits"] = model.decoder
    expected: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    with torch.no_grad():
        for case in LENGTHS:
            ids, mask, document = (
                inputs[f"{case}/{name}"] for name in ("input_ids", "attention_mask", "document")
            )
            parts = []
            for index in range(int(document.max()) + 1):
                chosen = slice(None) if len(ids) > 1 else document[0] == index
                padded = None if bool(mask.all()) else mask[:, chosen]
                model(input_ids=ids[:, chosen], attention_mask=padded)
                parts.append(dict(outputs))
            for name in modules:
                whole = torch.cat([part[name] for part in parts], dim=1)
                expected[f"{case}/{name}"] = whole.where(mask[..., None] == 1, torch.tensor(0.0))
    for hook in hooks:
        hook.remove()
    return expected


README = """\
# Conformance pack of the Ettin architecture

For ports of ModernBERT-shaped encoders and decoders. `encoder/` and `decoder/` hold tiny models in
Hugging Face format, with window 16, RoPE bases 160,000 (global layers) and 10,000 (local ones),
five layers, and a bias in the output layer.

`inputs.safetensors` has, for each case, `CASE/input_ids`, `CASE/attention_mask` (0 at padding) and
`CASE/document`, [rows, slots]. In the case `packed`, three documents share a row: positions and
attention restart in each.

`expected.safetensors` has what transformers computes on a CPU in float32, [rows, slots, channels]:
`CASE/embeddings` (after their norm), `CASE/layers.0` to `CASE/layers.4`, `CASE/final_norm`,
`CASE/head` and `CASE/logits`. Padding is not compared.

Run your port on the inputs, save its outputs under the same names (the more the better; logits
alone will do), and compare. The exit code is 0 if every output agrees:

    python check.py encoder OUTPUTS.safetensors [TOLERANCE]

A difference is the largest one of a tensor, as a share of the root mean square of what is expected.
The tolerance is 1e-4; transformers' own float32 is within 1e-5 of exact arithmetic.

For a port that differs, the program computes the tiny model in float64 once with each known error,
and names the error whose outputs are the port's, within the tolerance. Where no error gives them,
it names the nearest and how far away that is. It looks for windows that are one off or ignored, a
look into the future, padding that is attended to, swapped RoPE bases, a norm in layer 0, swapped
halves of the GLU, the tanh GELU, another epsilon, a missing output bias, a missing norm of the
head, and packed documents that are read as one.

- `length_1` has no other key: neither windows nor bases nor masks matter there.
- Lengths around the window show windows that are one off.
- `tiny_activations` has embeddings so small that the norms' epsilon decides.
- `padded_left` shows padding that a decoder attends to.
- `packed` shows documents that see each other, as in implementations that derive the documents'
  boundaries from restarting positions. RoPE alone would not show them: it sees differences of
  positions only.
"""
