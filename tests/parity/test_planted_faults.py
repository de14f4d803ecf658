"""Faults of the model, planted one at a time: in every layout alike, so transformers must tell."""

import dataclasses
from typing import Any

import pytest
import torch

from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig
from megatron_ettin.model import attention, ettin_model, layer_spec
from tests.faults import Effect, Fault, changed, instead
from tests.parity.conftest import Case
from tests.parity.references import TOLERANCE, difference
from tests.parity.stages import load_stage, stage_logits


def swap_rotations(
    original: Effect, layer: Any, *args: Any, rotary_pos_emb: torch.Tensor, **kwargs: Any
) -> Any:
    return original(layer, *args, rotary_pos_emb=rotary_pos_emb.flip(0), **kwargs)


def double_angles(
    original: Effect, layer: Any, *args: Any, rotary_pos_emb: torch.Tensor, **kwargs: Any
) -> Any:
    return original(layer, *args, rotary_pos_emb=2.0 * rotary_pos_emb, **kwargs)


def join_documents(original: Effect, packed: attention.PackedRows, *args: int) -> Any:
    one = packed.cu_seqlens_q[[0, -1]]
    return original(dataclasses.replace(packed, cu_seqlens_q=one, masks={}), *args)


def leave_scores_unscaled(original: Effect, core: Any, *args: Any) -> Any:
    core.scale = 1.0
    return original(core, *args)


def approximate_gelu(_: Effect, __: Any, gated: torch.Tensor) -> torch.Tensor:
    x, gate = gated.chunk(2, dim=-1)
    return torch.nn.functional.gelu(x, approximate="tanh") * gate


def swap_gate(original: Effect, module: Any, gated: torch.Tensor) -> Any:
    return original(module, torch.cat(gated.chunk(2, dim=-1)[::-1], dim=-1))


def larger_epsilon(original: Effect, norm: Any, *args: Any, **kwargs: Any) -> None:
    original(norm, *args, **kwargs)
    norm.eps *= 10.0


def plain_head(_: Effect, head: Any, hidden: torch.Tensor) -> Any:
    return head.norm(head.dense(hidden))


ROWS, CORE = attention.PackedRows, attention.SdpaCoreAttention
FAULTS = [
    Fault("any", what, owner, name, effect)
    for what, owner, name, effect in (
        ("window a key wider", attention, "layer_window", changed(lambda w: w and (w[0] + 1,) * 2)),
        (
            "window a key narrower",
            attention,
            "layer_window",
            changed(lambda w: w and (w[0] - 1,) * 2),
        ),
        ("local layers see all", attention, "layer_window", instead(None)),
        ("global layers see a window", attention, "is_layer_window_attention", instead(True)),
        ("no borders in local layers", ROWS, "block_mask", join_documents),
        ("no borders in global layers", ROWS, "lengths", changed(lambda lengths: [sum(lengths)])),
        ("no mask in local layers", ROWS, "block_mask", changed(torch.zeros_like)),
        ("the other direction", CORE, "sight", changed(lambda sight: (not sight[0], sight[1]))),
        ("scores unscaled", CORE, "attend", leave_scores_unscaled),
        ("rotations swapped", layer_spec.EttinLayer, "forward", swap_rotations),
        ("angles doubled", layer_spec.EttinLayer, "forward", double_angles),
        ("GELU by tanh", layer_spec.GatedGelu, "forward", approximate_gelu),
        ("gate and input swapped", layer_spec.GatedGelu, "forward", swap_gate),
        ("epsilon ten times as large", layer_spec.LayerNorm, "__init__", larger_epsilon),
        ("head without GELU", ettin_model.PredictionHead, "forward", plain_head),
    )
]


@pytest.mark.long
def test_a_fault_in_every_layout_shows(nano: Case) -> None:
    found: dict[str, float] = {}
    with distributed.process_groups(HardwareConfig()):
        for fault in FAULTS:
            reached: list[str] = []
            with pytest.MonkeyPatch.context() as patch:
                fault.plant(patch, reached)
                logits = stage_logits(load_stage(nano.checkpoint, HardwareConfig()), nano.packed)
            assert logits is not None
            assert reached, f"{fault.what}: never ran"
            found[fault.what] = difference(logits, nano.logits)
            print(f"{nano.name}, {fault.what}: {found[fault.what]:.1e}")
    assert [what for what, value in found.items() if value <= TOLERANCE] == []
