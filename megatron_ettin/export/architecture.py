"""Translation of ModernBERT configurations to ours and back: kinds, windows, RoPE bases, layers.

In both directions our model computes the same as transformers' (sdpa). That is not always what the
name of a field suggests: see `local_attention`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertForMaskedLM,
)

from megatron_ettin.checkpoint import SavedModel
from megatron_ettin.config import ModelConfig
from megatron_ettin.model.provider import Attention
from megatron_ettin.model.weight_map import Architecture
from megatron_ettin.objectives import CausalLM, MaskedLM, MaskedNextToken, Objective


@dataclass(frozen=True, kw_only=True)
class ModelKind:
    """One of the two kinds of model, on both sides."""

    attention: Attention
    architecture: Architecture
    config_class: Any
    model_class: Any


KINDS = (
    ModelKind(
        attention="bidirectional",
        architecture="encoder",
        config_class=ModernBertConfig,
        model_class=ModernBertForMaskedLM,
    ),
    ModelKind(
        attention="causal",
        architecture="decoder",
        config_class=ModernBertDecoderConfig,
        model_class=ModernBertDecoderForCausalLM,
    ),
)
#: Objectives that a run can go on with from imported weights; the first that fits is taken.
OBJECTIVES: tuple[type[Objective], ...] = (MaskedLM, CausalLM, MaskedNextToken)
#: Fields that have one value in the Ettin model, by their names in transformers.
FIXED_FIELDS: dict[str, Any] = {
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "attention_bias": False,
    "mlp_bias": False,
    "norm_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
    "tie_word_embeddings": True,
}
GLOBAL, LOCAL = "full_attention", "sliding_attention"
#: Fields of config.json that hold token ids.
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


def kind_of(attention: Attention) -> ModelKind:
    """Return the kind of model that attends in this way."""
    (kind,) = (kind for kind in KINDS if kind.attention == attention)
    return kind


def attention_of(architecture: Architecture) -> Attention:
    """Return how a model of this kind attends."""
    (kind,) = (kind for kind in KINDS if kind.architecture == architecture)
    return kind.attention


def as_kind(saved: SavedModel, architecture: Architecture) -> SavedModel:
    """Return the description of the weights as a model of this kind.

    Raises:
        ValueError: they were not trained for it.
    """
    wanted = attention_of(architecture)
    for face in saved.faces:
        if face.attention == wanted:
            return dataclasses.replace(
                saved,
                attention=face.attention,
                prediction_shift=face.prediction_shift,
                objective=face.objective,
            )
    if saved.attention != wanted:
        raise ValueError(
            f"these weights were last trained with {saved.attention} attention only, not with "
            f"{wanted}; objective Mixture trains both"
        )
    return saved


def objective_for(saved: SavedModel) -> type[Objective]:
    """Return an objective that trains such a model further, whatever trained it before.

    A model that a run trained says its own: `SavedModel.objective`.

    Raises:
        ValueError: no objective attends and predicts like this.
    """
    for objective in OBJECTIVES:
        if (objective.attention, objective.prediction_shift) == (
            saved.attention,
            saved.prediction_shift,
        ):
            return objective
    raise ValueError(
        f"prediction_shift: {saved.prediction_shift!r} is no objective's with {saved.attention} "
        f"attention; 1 is that of masked next-token prediction, 0 of all others"
    )


def prediction(saved: SavedModel) -> str:
    """Name what a position of the model predicts."""
    if saved.attention == "causal":
        return "the next token"
    return (
        f"the token {saved.prediction_shift} further on"
        if saved.prediction_shift
        else "its own token"
    )


def huggingface_config(saved: SavedModel, special_ids: Mapping[str, int | list[int]]) -> Any:
    """Return the transformers configuration that computes what `saved` computes.

    `special_ids` holds the fields SPECIAL_IDS.
    """
    model, kind = saved.model, kind_of(saved.attention)
    # The mean of all positions classifies better than the first position, which was never trained
    # to represent a text. transformers' default is "cls"; decoders have no such field.
    pooling = {"classifier_pooling": "mean"} if kind.architecture == "encoder" else {}
    config = kind.config_class(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        max_position_embeddings=saved.max_seq_length,
        initializer_range=model.init_std,
        norm_eps=model.layernorm_epsilon,
        local_attention=local_attention(kind, model.sliding_window),
        layer_types=_layer_types(model.num_layers, model.global_attention_every),
        rope_parameters={
            GLOBAL: {"rope_type": "default", "rope_theta": saved.rotary_base_global},
            LOCAL: {"rope_type": "default", "rope_theta": saved.rotary_base_local},
        },
        **FIXED_FIELDS,
        **pooling,
        **special_ids,
    )
    # transformers 4 reads these names only, and takes 160,000 / 10,000 where they are missing.
    config.global_attn_every_n_layers = model.global_attention_every
    config.global_rope_theta = saved.rotary_base_global
    config.local_rope_theta = saved.rotary_base_local
    if saved.prediction_shift:
        config.prediction_shift = saved.prediction_shift
    return config


def read_huggingface_config(
    folder: Path, sliding_window: int | None, prediction_shift: int | None
) -> SavedModel:
    """Read the description of the model in a ModernBERT-shaped folder; its tokenizer is not read.

    `sliding_window` replaces the window that transformers computes with, and `prediction_shift` the
    value in config.json (published models have none).

    Raises:
        ValueError: no config.json, another type of model, or a field that the Ettin model cannot
            represent; the message names the field.
    """
    path = folder / "config.json"
    kind, config = _load_config(path)
    _check_fixed_fields(path, kind, config)
    if sliding_window is None:
        sliding_window = _sliding_window(path, kind, config)
    if prediction_shift is None:
        prediction_shift = getattr(config, "prediction_shift", 0)
    try:
        model = ModelConfig(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            vocab_size=config.vocab_size,
            sliding_window=sliding_window,
            global_attention_every=_global_attention_every(path, config),
            layernorm_epsilon=config.norm_eps,
            init_std=config.initializer_range,
        )
        saved = SavedModel(
            model=model,
            attention=kind.attention,
            rotary_base_global=_rotary_base(config, GLOBAL),
            rotary_base_local=_rotary_base(config, LOCAL),
            max_seq_length=config.max_position_embeddings,
            tokenizer=None,
            prediction_shift=prediction_shift,
            special_ids=_special_ids(config),
        )
        objective_for(saved)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return saved


def local_attention(kind: ModelKind, sliding_window: int) -> int:
    """Return the field `local_attention` with which transformers sees `sliding_window` keys away.

    The encoder sees local_attention // 2 keys on each side. The decoder sees one key fewer to the
    left: its window counts the query's own key.
    """
    if kind.architecture == "encoder":
        return 2 * sliding_window
    return 2 * (sliding_window + 1)


def _sliding_window(path: Path, kind: ModelKind, config: Any) -> int:
    """Return the distance in keys that a local layer sees in transformers.

    transformers uses `sliding_window` of config.json, and derives it from `local_attention` where
    it is missing. Decoders that transformers 4 saved have `sliding_window` only.
    """
    window = config.sliding_window if kind.architecture == "encoder" else config.sliding_window - 1
    if window < 1:
        raise ValueError(
            f"{path}: local_attention: {config.local_attention}, sliding_window: "
            f"{config.sliding_window} let local layers see no other key"
        )
    return int(window)


def _special_ids(config: Any) -> dict[str, int | list[int]]:
    """Return the fields SPECIAL_IDS that hold ids of the vocabulary; some hold a list of ids."""
    valid: dict[str, int | list[int]] = {}
    for name in SPECIAL_IDS:
        value: Any = getattr(config, name, None)
        ids = value if isinstance(value, list) else [value]
        if all(isinstance(token, int) and 0 <= token < config.vocab_size for token in ids):
            valid[name] = value
    return valid


def _layer_types(num_layers: int, global_attention_every: int) -> list[str]:
    return [LOCAL if layer % global_attention_every else GLOBAL for layer in range(num_layers)]


def _global_attention_every(path: Path, config: Any) -> int:
    layer_types, num_layers = list(config.layer_types), config.num_hidden_layers
    # A shallow model fits several periods. 3 is tried first, because deeper Ettin models have it.
    for period in (3, *range(1, num_layers + 1)):
        if layer_types == _layer_types(num_layers, period):
            return int(period)
    raise ValueError(
        f"{path}: layer_types: {layer_types} is not one {GLOBAL} at layers 0, n, 2n, ... of "
        f"{num_layers} and {LOCAL} between"
    )


def _rotary_base(config: Any, layer_type: str) -> float:
    rope = config.rope_parameters[layer_type]
    if rope.get("rope_theta") is None and layer_type == LOCAL:
        # transformers 4 takes the global base where `local_rope_theta` is null; 5 cannot run it.
        return _rotary_base(config, GLOBAL)
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"rope_parameters.{layer_type}.rope_type: {rope['rope_type']!r} has no "
            f"equivalent here; only 'default' has"
        )
    if rope.get("rope_theta") is None:
        raise ValueError(f"rope_parameters.{layer_type}.rope_theta: has no value")
    return float(rope["rope_theta"])


def _load_config(path: Path) -> tuple[ModelKind, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent}: no Hugging Face model here ({path.name} is missing)")
    try:
        document = json.loads(path.read_text())
        model_type = document.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a JSON object: {error}") from error
    kinds = {kind.config_class.model_type: kind for kind in KINDS}
    if model_type not in kinds:
        raise ValueError(f"{path}: model_type: {model_type!r}; only {' and '.join(kinds)} convert")
    try:
        return kinds[model_type], kinds[model_type].config_class.from_dict(document)
    except Exception as error:  # the library raises nothing narrower for a field of a wrong type
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _check_fixed_fields(path: Path, kind: ModelKind, config: Any) -> None:
    # Only an encoder's modules read `is_causal`, and then attend causally.
    causal = {"is_causal": False} if kind.architecture == "encoder" else {}
    for name, value in {**FIXED_FIELDS, **causal}.items():
        actual = getattr(config, name, value)
        if actual != value:
            raise ValueError(
                f"{path}: {name}: {actual!r} has no equivalent here; only {value!r} has"
            )
