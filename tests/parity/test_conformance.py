"""The pack for ports of the architecture: 12 planted errors are named, a right port passes."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.modernbert_decoder import modeling_modernbert_decoder as decoder_module

from megatron_ettin.export.architecture import KINDS, ModelKind
from megatron_ettin.export.conformance import LENGTHS, make_inputs, make_model, run
from megatron_ettin.export.huggingface import from_huggingface
from tests.parity.references import Packed
from tests.parity.stages import checkpoint_logits
from tools.convert import main

BOTH = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.architecture)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conformance") / "pack"
    main(["conformance", "--output", str(folder)])
    return folder


def check(pack: Path, kind: ModelKind, outputs: dict[str, torch.Tensor]) -> tuple[int, str]:
    """Return exit code and output of the pack's program, run as a stranger would."""
    path = pack / "outputs.safetensors"
    save_file(outputs, path)
    command = [sys.executable, "-I", str(pack / "check.py"), kind.architecture, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def head_of(model: Any) -> Any:
    return getattr(model, "lm_head", None) or model.head


def widen(by: int) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        model.config.sliding_window += by
        for layer in model.model.layers:
            if layer.attn.sliding_window is not None:
                layer.attn.sliding_window += by

    return plant


def swap_bases(model: Any) -> None:
    rotary = model.model.rotary_emb
    full, local = rotary.full_attention_inv_freq.clone(), rotary.sliding_attention_inv_freq.clone()
    rotary.full_attention_inv_freq, rotary.sliding_attention_inv_freq = local, full


def norm_layer_0(model: Any) -> None:
    size, eps = model.config.hidden_size, model.config.norm_eps
    model.model.layers[0].attn_norm = torch.nn.LayerNorm(size, eps=eps, bias=False)


def swap_halves(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.Wi.weight.data = torch.cat(list(layer.mlp.Wi.weight.chunk(2))[::-1])


def tanh_gelu(model: Any) -> None:
    tanh = torch.nn.GELU(approximate="tanh")
    for layer in model.model.layers:
        layer.mlp.act = tanh
    head_of(model).act = tanh


def other_epsilon(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-12


def no_output_bias(model: Any) -> None:
    model.decoder.bias = None


def no_head_norm(model: Any) -> None:
    head_of(model).norm = torch.nn.Identity()


#: Errors in transformers' own modules, by what the program must call them.
PLANTED: dict[str, Callable[[Any], None]] = {
    "window: one key too few": widen(-1),
    "window: one key too many": widen(1),
    "window: ignored": widen(10**6),
    "RoPE bases": swap_bases,
    "layer 0": norm_layer_0,
    "MLP": swap_halves,
    "GELU": tanh_gelu,
    "norm epsilon": other_epsilon,
    "output bias": no_output_bias,
    "head": no_head_norm,
}


@BOTH
@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_named(error: str, kind: ModelKind, pack: Path) -> None:
    model = make_model(kind)
    PLANTED[error](model)
    code, said = check(pack, kind, run(model, make_inputs()))
    assert code == 1
    assert said.startswith("FAIL")
    assert f"broken property: {error}" in said


@BOTH
@pytest.mark.parametrize(
    ("error", "tensor", "value"), [("padding", "attention_mask", 1), ("packing", "document", 0)]
)
def test_an_input_that_a_port_ignores_is_named(
    error: str, tensor: str, value: int, kind: ModelKind, pack: Path
) -> None:
    ignored = {
        name: torch.full_like(found, value) if name.endswith(tensor) else found
        for name, found in make_inputs().items()
    }
    code, said = check(pack, kind, run(make_model(kind), ignored))
    assert (code, f"broken property: {error}" in said) == (1, True), said


def test_a_look_into_the_future_is_named(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kind,) = (kind for kind in KINDS if kind.attention == "causal")

    def seen(*, config: Any, inputs_embeds: torch.Tensor, is_local: bool, **other: Any) -> Any:
        slots = torch.arange(inputs_embeds.shape[1])
        reach = config.sliding_window - 1 if is_local else len(slots)
        near = (slots[None] - slots[:, None]).abs() <= reach
        padding = other.get("attention_mask")
        keys = torch.ones(len(inputs_embeds), len(slots)) if padding is None else padding
        return near[None, None] & ((keys[:, None, None] == 1) | torch.eye(len(slots)).bool())

    for name, is_local in (("causal", False), ("sliding_window_causal", True)):
        monkeypatch.setattr(
            decoder_module,
            f"create_{name}_mask",
            lambda is_local=is_local, **given: seen(is_local=is_local, **given),
        )
    code, said = check(pack, kind, run(make_model(kind), make_inputs()))
    assert (code, "broken property: causality" in said) == (1, True), said


@BOTH
def test_transformers_passes_and_logits_alone_are_enough(kind: ModelKind, pack: Path) -> None:
    expected = load_file(pack / kind.architecture / "expected.safetensors")
    code, said = check(pack, kind, run(make_model(kind), make_inputs()))
    assert (code, said.split(";")[0]) == (0, "PASS"), said
    assert f"{len(expected)} of {len(expected)} compared" in said
    model = make_model(kind)
    widen(1)(model)
    logits = {n: v for n, v in run(model, make_inputs()).items() if n.endswith("logits")}
    code, said = check(pack, kind, logits)
    assert (code, "broken property: window: one key too many" in said) == (1, True), said
    assert check(pack, kind, {"unknown": torch.ones(1)})[0] == 1


@BOTH
def test_our_model_passes(kind: ModelKind, pack: Path, tmp_path: Path) -> None:
    from_huggingface(pack / kind.architecture, tmp_path / "c")
    inputs, outputs = make_inputs(), {}
    for case in LENGTHS:
        names = ("input_ids", "attention_mask", "document")
        ids, mask, document = (inputs[f"{case}/{name}"] for name in names)
        found = torch.zeros(*ids.shape, 160)
        for row in range(len(ids)):
            real = mask[row] == 1
            packed = Packed.of_one(ids[row][real])
            lengths = torch.bincount(document[row][real])
            packed = dataclasses.replace(
                packed,
                cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
                position_ids=torch.cat([torch.arange(length) for length in lengths]),
            )
            found[row, real] = checkpoint_logits(tmp_path / "c", packed)
        outputs[f"{case}/logits"] = found
    code, said = check(pack, kind, outputs)
    assert (code, said.split(";")[0]) == (0, "PASS"), said
