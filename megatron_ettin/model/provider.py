"""The Ettin model provider: ModelConfig + attention -> module, in Megatron-Core's terms."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, assert_never

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig, ModelConfig, SeedConfig
from megatron_ettin.model import weight_map
from megatron_ettin.model.attention import KindAndLength
from megatron_ettin.model.backend import Backend, by_transformer_engine, choose_backend
from megatron_ettin.model.ettin_model import EttinModel
from megatron_ettin.model.initialize import initial_tensor, local_shard
from megatron_ettin.model.layer_spec import block_spec

Attention = Literal["bidirectional", "causal"]
ATTENTION_MASKS: dict[Attention, AttnMaskType] = {
    "bidirectional": AttnMaskType.padding,
    "causal": AttnMaskType.causal,
}


def build_model(
    model: ModelConfig,
    attention: Attention,
    hardware: HardwareConfig,
    seeds: SeedConfig,
    by_engine: frozenset[KindAndLength] = frozenset(),
) -> EttinModel:
    """Return this rank's stage of the model, with initial weights, on this rank's device.

    Needs process groups (`distributed.process_groups`). Transformer Engine computes the attention
    of the layers `by_engine`, over rows of the lengths there.
    """
    backend = choose_backend(model, hardware)
    stage = build_stage(model, attention, hardware, seeds, backend, by_engine)
    initialize_weights(stage, seeds.init)
    return stage.to(distributed.device())


def build_stage(
    model: ModelConfig,
    attention: Attention,
    hardware: HardwareConfig,
    seeds: SeedConfig,
    backend: Backend = "local",
    by_engine: frozenset[KindAndLength] = frozenset(),
) -> EttinModel:
    """Return this rank's stage on the CPU, with uninitialised weights."""
    config = transformer_config(model, attention, hardware, backend)
    pp_rank = distributed.pipeline_parallel_rank()
    first = get_transformer_layer_offset(config, None, pp_rank)
    layers = range(first, first + get_num_layers_to_build(config, None, pp_rank))
    return EttinModel(
        config,
        model,
        block_spec(config, ATTENTION_MASKS[attention], layers, backend, by_engine),
        pre_process=distributed.is_first_stage(),
        post_process=distributed.is_last_stage(),
        dropout_seed=seeds.dropout,
    )


def initialize_weights(stage: EttinModel, seed: int) -> None:
    """Fill every parameter of the stage from counters; KeyError for one without an entry.

    The rank's CPU threads draw one tensor each: for 1B, one thread alone needs most of a minute.
    """
    entries = weight_map.entries(stage.model_config.num_layers)
    rank, size = distributed.tensor_parallel_rank(), distributed.tensor_parallel_size()

    def fill(named: tuple[str, torch.nn.Parameter]) -> None:
        name, parameter = named
        whole = initial_tensor(entries[name], stage.model_config, seed)
        with torch.no_grad():
            parameter.copy_(local_shard(whole, parameter, rank, size))

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for _ in threads.map(fill, logical_parameters(stage)):
            pass  # an error is raised here


def logical_parameters(stage: EttinModel) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the stage's parameters by their names in the whole model.

    Layers are counted over all stages, and the last stage's copy of the tied embedding goes by the
    embedding's name.
    """
    first = stage.decoder.layers[0].layer_number - 1 if len(stage.decoder.layers) else 0
    named = []
    for name, parameter in stage.named_parameters():
        if name.startswith("decoder.layers."):
            layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
            name = f"decoder.layers.{int(layer) + first}.{rest}"
        if name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        named.append((name, parameter))
    return named


def transformer_config(
    model: ModelConfig,
    attention: Attention,
    hardware: HardwareConfig,
    backend: Backend = "local",
) -> TransformerConfig:
    """Translate our configuration to Megatron-Core's.

    Raises:
        ValueError: `model.megatron_overrides` names no field of TransformerConfig, or
            `hardware.precision` is still auto (`training/precision.py` resolves it).
    """
    if hardware.is_fp8 is None:
        raise ValueError("hardware.precision: auto is no precision; see training/precision.py")
    _require_known(model.megatron_overrides)
    local = [not model.is_global(layer) for layer in range(model.num_layers)]
    is_bf16 = hardware.parameter_precision == "bf16"
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    right = model.sliding_window if attention == "bidirectional" else 0
    fields = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "layernorm_epsilon": model.layernorm_epsilon,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.gelu,  # exact erf, as in ModernBERT
        # Despite its name this takes any activation module of the spec: here GatedGelu.
        "use_te_activation_func": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "window_size": (model.sliding_window, right),
        # A list: as an integer n it would make layers n, 2n, ... (from 1) global.
        "window_attn_skip_freq": [int(is_local) for is_local in local],
        # Layer 0 lacks a norm, so the layers cannot be stacked into one tensor per name.
        "hetereogenous_dist_checkpoint": True,
        "tensor_model_parallel_size": hardware.tensor_parallel_size,
        "sequence_parallel": hardware.sequence_parallel,
        "context_parallel_size": hardware.context_parallel_size,
        **_recompute(hardware),
        "pipeline_model_parallel_size": hardware.pipeline_parallel_size,
        **_uneven_stages(model.num_layers, hardware.pipeline_parallel_size),
        "pipeline_dtype": dtype,
        "params_dtype": dtype,
        "bf16": is_bf16,
        "deterministic_mode": hardware.deterministic,
        "use_cpu_initialization": True,
        # Megatron-Core marks parameters as sharded only where it calls an init method. Ours does
        # nothing: `initialize_weights` fills the values.
        "init_method": _leave_as_is,
        "output_layer_init_method": _leave_as_is,
        "embedding_init_method": _leave_as_is,
        "calculate_per_token_loss": True,
        **_backend_fields(backend),
        **_fp8_fields(hardware),
    }
    return TransformerConfig(**{**fields, **model.megatron_overrides})


#: Settings of parts of Megatron-Core's layer that `EttinLayer` and `EttinSelfAttention` replace.
REPLACED = {
    *("hidden_dropout", "bias_dropout_fusion", "apply_rope_fusion", "rotary_interleaved"),
    *("fused_single_qkv_rope", "no_rope_freq", "qk_layernorm", "attention_output_gate"),
    *("recompute_granularity", "recompute_modules", "fine_grained_activation_offloading"),
}


def _require_known(overrides: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"model.megatron_overrides: TransformerConfig has no field {unknown}")
    if replaced := sorted(set(overrides) & REPLACED):
        raise ValueError(
            f"model.megatron_overrides: {replaced} would change nothing: Ettin's layer has its own "
            "addition, rotation and recomputation (hardware.recompute); leave them out"
        )


def _backend_fields(backend: Backend) -> dict[str, object]:
    """Return the fusions: Transformer Engine's accumulation of weight gradients."""
    return {
        "gradient_accumulation_fusion": by_transformer_engine(backend),
        "apply_rope_fusion": False,  # `rotary.rotated` has a kernel of its own
        # These need apex, or (bias fusions) compute the tanh GELU.
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
    }


def _fp8_fields(hardware: HardwareConfig) -> dict[str, object]:
    """Return the recipe of the layers' linears; Megatron-Core's block enters it around them."""
    if not hardware.is_fp8:
        return {}
    fields: dict[str, object] = {
        "fp8_recipe": hardware.fp8_recipe,
        # With graphs each micro-batch runs as the first one of a step. Transformer Engine would
        # then overwrite the gradients of the one before; told of no first one, it always adds.
        "disable_parameter_transpose_cache": hardware.cuda_graphs,
    }
    match hardware.fp8_recipe:
        case "blockwise":
            return fields | {"fp8": "e4m3"}
        # hybrid: gradients in E5M2, whose range is wider. Blockwise scaling does not need that
        # range.
        case "tensorwise":
            return fields | {"fp8": "hybrid"}
        case "delayed":
            # Transformer Engine's defaults; Megatron-Core's history is one step long.
            history = {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
            return fields | {"fp8": "hybrid", **history}
        case _:
            assert_never(hardware.fp8_recipe)


def _recompute(hardware: HardwareConfig) -> dict[str, object]:
    if not hardware.recomputes_layers:
        return {}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _uneven_stages(num_layers: int, stages: int) -> dict[str, int]:
    """Return how many layers the last stage holds when they do not divide evenly."""
    if num_layers % stages == 0:
        return {}
    rounded_up = -(-num_layers // stages)
    last = num_layers - rounded_up * (stages - 1)
    if last < 1:
        last = num_layers - (num_layers // stages) * (stages - 1)
    return {"num_layers_in_last_pipeline_stage": last}
