"""Modules of a model depend on the machine, its weights do not."""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig, ModelConfig, SeedConfig, check_fp8
from megatron_ettin.model.attention import KindAndLength, PackedRows, SdpaCoreAttention
from megatron_ettin.model.attention_gpu import (
    TransformerEngineCoreAttention,
    VarlenCoreAttention,
    packed_kernel,
    varlen_window,
)
from megatron_ettin.model.backend import choose_backend, core_attention
from megatron_ettin.model.ettin_model import EttinModel
from megatron_ettin.model.provider import (
    build_stage,
    initialize_weights,
    transformer_config,
)
from tests.ranks import lone_rank

TINY = ModelConfig(
    num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, vocab_size=100
)
WITH_ENGINE = dataclasses.replace(TINY, backend="transformer_engine")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU has")
#: What Megatron-Core hangs on parameters, for initialisation, reductions and checkpoints.
MARKS = (
    "tensor_model_parallel",
    "partition_dim",
    "partition_stride",
    "sequence_parallel",
    "allreduce",
)


@without_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_a_cpu_has_the_local_backend(precision: Any) -> None:
    assert choose_backend(TINY, HardwareConfig(precision=precision)) == "local"


@without_gpu
def test_what_needs_a_gpu_is_refused_without_one() -> None:
    with pytest.raises(ValueError, match=r"model\.backend: transformer_engine.*no CUDA device"):
        choose_backend(WITH_ENGINE, HardwareConfig(precision="bf16"))
    with pytest.raises(ValueError, match=r"hardware\.precision: fp8.*no CUDA device"):
        choose_backend(TINY, HardwareConfig(precision="fp8"))


@pytest.mark.gpu
def test_a_gpu_has_transformer_engine_where_it_is_installed() -> None:
    pytest.importorskip("transformer_engine.pytorch")
    assert choose_backend(TINY, HardwareConfig(precision="bf16")) == "transformer_engine"
    assert choose_backend(TINY, HardwareConfig(precision="fp32")) == "local"
    local = dataclasses.replace(TINY, backend="local")
    assert choose_backend(local, HardwareConfig(precision="bf16")) == "local"


def test_two_models_that_differ_in_the_backend_are_the_same_model() -> None:
    assert WITH_ENGINE == TINY


@pytest.mark.parametrize(
    ("recipe", "form", "history"),
    [("delayed", "hybrid", 1024), ("tensorwise", "hybrid", 1), ("blockwise", "e4m3", 1)],
)
def test_fp8_reaches_megatron(recipe: Any, form: str, history: int) -> None:
    hardware = HardwareConfig(precision="fp8", fp8_recipe=recipe, deterministic=True)
    config = transformer_config(TINY, "causal", hardware)
    assert (config.fp8, config.fp8_recipe) == (form, recipe)
    assert config.fp8_amax_history_len == history
    assert not config.fp8_param
    assert not config.fp8_dot_product_attention
    assert config.params_dtype == torch.bfloat16
    assert config.bf16
    assert config.deterministic_mode


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("delayed", "TEDelayedScaling"),
        ("tensorwise", "Float8CurrentScaling"),
        ("blockwise", "Float8BlockScaling"),
    ],
)
def test_recipes_are_transformer_engines_and_leave_attention_alone(recipe: Any, name: str) -> None:
    pytest.importorskip("transformer_engine.pytorch")
    from megatron.core.fp8_utils import get_fp8_recipe

    hardware = HardwareConfig(precision="fp8", fp8_recipe=recipe)
    found = get_fp8_recipe(transformer_config(TINY, "causal", hardware, "transformer_engine"))
    assert type(found).__name__ == name
    assert not found.fp8_dpa


@pytest.mark.parametrize("backend", ["local", "transformer_engine"])
def test_only_transformer_engine_fuses_gradients(backend: Any) -> None:
    if backend == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    config = transformer_config(TINY, "causal", HardwareConfig(precision="bf16"), backend)
    assert config.fp8 is None
    assert config.gradient_accumulation_fusion == (backend == "transformer_engine")
    assert not config.tp_comm_overlap


def test_auto_is_not_built() -> None:
    with pytest.raises(ValueError, match=r"hardware\.precision: auto"):
        transformer_config(TINY, "causal", HardwareConfig(precision="auto"))


@pytest.mark.parametrize(
    ("model", "hardware", "seq_length", "named"),
    [
        ({}, {"micro_batch_tokens": 72}, 24, r"hardware\.micro_batch_tokens.*72"),
        (
            {},
            {"sequence_parallel": True, "tensor_parallel_size": 2, "micro_batch_tokens": 16},
            16,
            r"hardware\.micro_batch_tokens.*shared by 2",
        ),
        ({"hidden_size": 40}, {}, 32, r"model\.hidden_size.*40"),
        ({"ffn_hidden_size": 48}, {"tensor_parallel_size": 2}, 32, r"model\.ffn_hidden_size.*48"),
    ],
)
def test_shapes_that_fp8_cannot_have_are_named(
    model: dict[str, Any], hardware: dict[str, Any], seq_length: int, named: str
) -> None:
    settings = {"micro_batch_tokens": 64, "precision": "fp8", **hardware}
    with pytest.raises(ValueError, match=named):
        check_fp8(dataclasses.replace(TINY, **model), HardwareConfig(**settings), seq_length)


def test_shapes_that_fp8_can_have_pass() -> None:
    hardware = HardwareConfig(
        precision="fp8", tensor_parallel_size=2, sequence_parallel=True, micro_batch_tokens=64
    )
    check_fp8(dataclasses.replace(TINY, ffn_hidden_size=64), hardware, 32)


def test_windows_in_the_kernels_terms() -> None:
    assert varlen_window(is_causal=False, window=None) == (-1, -1)
    assert varlen_window(is_causal=True, window=None) == (-1, 0)
    assert varlen_window(is_causal=False, window=(64, 64)) == (64, 64)
    assert varlen_window(is_causal=True, window=(64, 0)) == (64, 0)


@without_gpu
def test_a_cpu_and_fp32_attend_by_sdpa() -> None:
    for precision in ("fp32", "bf16"):
        config = transformer_config(TINY, "causal", HardwareConfig(precision=precision))  # type: ignore[arg-type]
        assert core_attention(config, 1, frozenset({("global", 48)})) is SdpaCoreAttention


def test_a_gpu_attends_by_torchs_kernel_unless_another_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = transformer_config(TINY, "causal", HardwareConfig(precision="bf16"))
    assert {core_attention(config, layer) for layer in (1, 2, 3)} == {VarlenCoreAttention}
    by_engine: frozenset[KindAndLength] = frozenset({("local", 48), ("local", 64)})
    of_global, of_local = (core_attention(config, layer, by_engine) for layer in (1, 2))
    assert of_global is VarlenCoreAttention
    assert isinstance(of_local, partial)
    assert of_local.func is TransformerEngineCoreAttention
    assert of_local.keywords == {"row_lengths": {48, 64}}


def test_varlen_takes_a_stream_and_returns_its_heads_side_by_side() -> None:
    """By the shapes that torch derives; the values need a GPU."""
    config = transformer_config(TINY, "causal", HardwareConfig(precision="bf16"))
    core = VarlenCoreAttention(config, 2, AttnMaskType.causal, "self", pg_collection=lone_rank())
    with torch.device("meta"):
        q, k, v = (torch.empty(48, 1, 2, 16, dtype=torch.bfloat16) for _ in range(3))
        borders = torch.empty(4, dtype=torch.int32)
        packed = PackedRows.of(borders, 48, torch.empty(48), torch.empty(1))
    out = core(q, k, v, None, packed_seq_params=packed)
    assert (out.shape, out.dtype) == ((48, 1, 32), torch.bfloat16)


def described(stage: EttinModel) -> dict[str, Any]:
    return {
        name: (
            parameter.shape,
            parameter.dtype,
            *(getattr(parameter, mark, None) for mark in MARKS),
        )
        for name, parameter in stage.named_parameters()
    }


def checkpointed(stage: EttinModel) -> dict[str, Any]:
    shards = stage.sharded_state_dict(
        metadata={"dp_cp_group": distributed.data_parallel_group()}
    ).items()
    return {
        name: (shard.key, shard.data.shape, getattr(shard, "global_shape", None), shard.replica_id)
        for name, shard in shards
    }


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_checkpoint_is_the_same_from_both_backends(
    precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformer_engine.pytorch")
    # Its modules refuse to be built where there is no GPU, though they are built on the CPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    hardware = HardwareConfig(precision=precision)
    local, engine = (
        build_stage(TINY, "causal", hardware, SeedConfig(), backend)
        for backend in ("local", "transformer_engine")  # type: ignore[misc]
    )
    assert described(local) == described(engine)
    assert checkpointed(local) == checkpointed(engine)
    assert not any(name.endswith("_extra_state") for name in checkpointed(engine))
    initialize_weights(local, seed=3)
    weights = {name: parameter.detach() for name, parameter in local.named_parameters()}
    for stage in (engine, local):
        stage.load_state_dict(weights)
        for name, parameter in stage.named_parameters():
            assert torch.equal(parameter, weights[name]), name
    with pytest.raises(RuntimeError, match="Missing key"):
        engine.load_state_dict({})


@pytest.mark.parametrize(
    ("is_causal", "window", "mask", "seen"),
    [
        (False, None, "padding", (-1, -1)),
        (True, None, "padding_causal", (-1, 0)),
        (False, (64, 64), "padding", (64, 64)),
        (True, (64, 0), "padding_causal", (64, 0)),
    ],
)
def test_transformer_engine_is_told_masks_and_windows(
    is_causal: bool,
    window: tuple[int, int] | None,
    mask: str,
    seen: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("transformer_engine.pytorch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kernel: Any = packed_kernel(2, 16, is_causal=is_causal, window=window)
    assert (kernel.attn_mask_type, kernel.window_size, kernel.qkv_format) == (mask, seen, "thd")
    assert list(kernel.state_dict()) == ["_extra_state"]
