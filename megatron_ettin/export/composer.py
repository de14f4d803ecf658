"""Conversion of raw Composer checkpoints (the code that trained Ettin and ModernBERT) to ours.

Names and nesting are those of `src/bert_layers/model.py` of that code (FlexBertForMaskedLM,
FlexBertForCausalLM) and of Composer's `HuggingFaceModel.get_metadata`. Of a file's pickled objects,
only tensors, plain containers and the types of `HARMLESS` are loaded.
"""

from __future__ import annotations

import datetime
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megatron_ettin.checkpoint import SavedModel
from megatron_ettin.config import HardwareConfig, ModelConfig
from megatron_ettin.export import weights
from megatron_ettin.export.architecture import objective_for
from megatron_ettin.export.huggingface import check_free, own_tokenizer, write_checkpoint

Settings = dict[str, Any]

#: Function that pickled numpy arrays name; its module differs between numpy 1 and 2.
RECONSTRUCT: Callable[..., Any] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]
#: Types that a Composer checkpoint holds beside weights: wall-clock times, the state of numpy's
#: generator, the version of torch. Building them runs no code of the file.
HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    datetime.timedelta,
    torch.torch_version.TorchVersion,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    (RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
]
#: Settings that must be there, because the original code has another default.
STATED: Settings = {
    "attention_layer": "rope",
    "bert_layer": "prenorm",
    "embedding_layer": "sans_pos",
    "final_norm": True,
    "head_pred_act": "gelu",
    "mlp_layer": "glu",
    "normalization": "layernorm",
    "skip_first_prenorm": True,
}
#: Settings that may be left out: the original code's defaults are these.
DEFAULT: Settings = {
    "attn_out_bias": False,
    "attn_qkv_bias": False,
    "decoder_bias": True,
    "embed_norm": True,
    "head_pred_bias": False,
    "head_pred_norm": True,
    "hidden_act": "gelu",
    "initial_attention_layer": None,
    "initial_bert_layer": None,
    "initial_mlp_layer": None,
    "local_attn_rotary_emb_dim": None,
    "mlp_in_bias": False,
    "mlp_out_bias": False,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Source:
    """Settings of a model, and the file and field they were read from."""

    where: str
    settings: Settings
    max_seq_length: int | None

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number; YAML reads 1e-5 as text, which is taken too."""
        value = self.settings.get(name, default)
        try:
            if not isinstance(value, bool):
                return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            pass
        raise ValueError(f"{self.where}: {name}: {value!r} is no number")

    def integer(self, name: str) -> int:
        """Return a number that is an integer."""
        value = self.number(name)
        if value != int(value):
            raise ValueError(f"{self.where}: {name}: {value!r} is no integer")
        return int(value)


def from_composer(
    file: Path,
    output: Path,
    *,
    config: Path | None = None,
    max_seq_length: int | None = None,
    prediction_shift: int | None = None,
    tokenizer: Path | None = None,
) -> SavedModel:
    """Convert a Composer checkpoint to a checkpoint of weights, which appears when complete.

    `config` is the training YAML, for a file that does not hold its model's settings;
    `max_seq_length` the longest rows, which only that YAML knows.

    Raises:
        ValueError: naming the setting or tensor that is missing or has no equivalent here, the
            pickled type that is not read, or the option that must say what no file does.
    """
    check_free(output)
    loaded = _load(file)
    tensors = _tensors(file, loaded)
    usable = None if tokenizer is None else own_tokenizer(tokenizer)
    saved = _saved_model(
        _source(file, loaded, config),
        max_seq_length=max_seq_length,
        prediction_shift=prediction_shift,
        tokenizer=str(tokenizer.absolute()) if tokenizer is not None and usable else None,
        has_decoder_head="lm_head.dense.weight" in tensors,
    )
    names = _check(file, tensors, saved.model)
    write_checkpoint(
        output,
        saved,
        lambda name: tensors[names[name]],
        source=file,
        # The original code fuses Q, K and V in both kinds, as transformers does in encoders.
        names_of="encoder",
        tokenizer=usable,
        hardware=HardwareConfig(),
    )
    return saved


def _load(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds a pickled {named[1]}" if named else "is no file of torch.save"
        raise ValueError(
            f"{file}: {what}, and no code of a file is run here; save what matters of it where you "
            f"trust it: state = torch.load(...)['state'], then torch.save({{'state': {{name: "
            f"state[name] for name in ('model', 'integrations')}}}}, ...)"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{file}: damaged, or no file of torch.save: {error}") from error


def _tensors(file: Path, loaded: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a Composer checkpoint, or of a file of weights alone, by name."""
    tensors = loaded
    for name in ("state", "model"):
        if isinstance(tensors, dict) and name in tensors:
            tensors = tensors[name]
    is_dict = isinstance(tensors, dict)
    if not is_dict or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{file}: no weights here (neither state.model nor a dict of tensors)")
    # Wrappers put their names in front: DistributedDataParallel, then Composer's HuggingFaceModel.
    for prefix in ("module.", "model."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _source(file: Path, loaded: Any, config: Path | None) -> Source:
    try:
        own = loaded["state"]["integrations"]["huggingface"]["model"]["config"]["content"]
    except (KeyError, TypeError):
        own = None
    if own is not None and config is not None:
        raise ValueError(f"{config}: not needed: {file} holds the settings of its model")
    if own is not None:
        return Source(f"{file}: state.integrations.huggingface.model.config", own, None)
    if config is None:
        raise ValueError(
            f"{file}: does not hold the settings of its model (state.integrations.huggingface); "
            f"give --config with the YAML it was trained from"
        )
    try:
        document = yaml.safe_load(config.read_text(encoding="utf-8"))
        return Source(
            f"{config}: model.model_config",
            dict(document["model"]["model_config"]),
            document.get("max_seq_len"),
        )
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{config}: no training YAML with model.model_config: {' '.join(str(error).split())}"
        ) from error


def _saved_model(
    source: Source,
    *,
    max_seq_length: int | None,
    prediction_shift: int | None,
    tokenizer: str | None,
    has_decoder_head: bool,
) -> SavedModel:
    settings, where = source.settings, source.where
    attention = "causal" if settings.get("causal_mask", False) else "bidirectional"
    if max_seq_length is None:
        max_seq_length = source.max_seq_length
    if max_seq_length is None:
        raise ValueError(f"{where}: does not say how long rows were: give --max-seq-length")
    if prediction_shift is None and attention == "bidirectional" and has_decoder_head:
        raise ValueError(
            f"{where}: bidirectional attention with a decoder's head (lm_head): say how masks were "
            f"predicted: --prediction-shift 1 (from the position before, MNTP) or 0 (in place)"
        )
    base = source.number("rotary_emb_base", 10_000.0)
    local_base = source.number("local_attn_rotary_emb_base", -1)
    model = _model(source)
    saved = SavedModel(
        model=model,
        attention=attention,  # type: ignore[arg-type]
        rotary_base_global=base,
        rotary_base_local=base if local_base == -1 else local_base,
        max_seq_length=max_seq_length,
        tokenizer=tokenizer,
        prediction_shift=prediction_shift or 0,
    )
    try:
        objective_for(saved)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return saved


def _model(source: Source) -> ModelConfig:
    """Return the architecture; raise ValueError for a setting that has no equivalent here."""
    settings, where = source.settings, source.where
    for name, expected in {**STATED, **DEFAULT}.items():
        value = settings.get(name, DEFAULT.get(name))
        if value != expected:
            raise ValueError(f"{where}: {name}: {value!r} has no equivalent here; {expected!r} has")
    norm = settings.get("norm_kwargs") or {}
    if norm.get("bias", True):
        raise ValueError(f"{where}: norm_kwargs.bias: only norms without a bias exist here")
    window, period = source.integer("sliding_window"), source.integer("global_attn_every_n_layers")
    if window < 2 or period < 1:
        raise ValueError(
            f"{where}: sliding_window: {window} with global_attn_every_n_layers: {period} has no "
            f"equivalent here: local layers need a window, global ones a period"
        )
    try:
        model = ModelConfig(
            num_layers=source.integer("num_hidden_layers"),
            hidden_size=source.integer("hidden_size"),
            ffn_hidden_size=source.integer("intermediate_size"),
            num_attention_heads=source.integer("num_attention_heads"),
            vocab_size=source.integer("vocab_size"),
            # The original code gives flash attention half of it: keys on each side, besides the
            # own.
            sliding_window=window // 2,
            global_attention_every=period,
            layernorm_epsilon=Source(where, norm, None).number("eps", 1e-5),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where not in str(error) else str(error)) from error
    if settings.get("rotary_emb_dim") not in (None, model.head_size):
        raise ValueError(f"{where}: rotary_emb_dim: {settings['rotary_emb_dim']!r} is not a head's")
    return model


def _check(file: Path, tensors: dict[str, torch.Tensor], model: ModelConfig) -> dict[str, str]:
    """Return the file's name of each tensor; ValueError if the tensors are not the model's."""
    head = "lm_head." if "lm_head.dense.weight" in tensors else "head."
    shapes = weights.expected_shapes(model, "encoder")
    names = {name: _name_in_file(name, head) for name in shapes}
    weights.check_names(file, set(names.values()), set(tensors))
    for name, theirs in names.items():
        tensor = tensors[theirs]
        weights.check_tensor(
            f"{file}: tensor {theirs}",
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            shapes[name],
        )
    embedding = tensors[names[weights.TIED_TO]]
    if not torch.equal(tensors.get(weights.TIED, embedding), embedding):
        raise ValueError(f"{file}: {weights.UNTIED}")
    return names


def _name_in_file(name: str, head: str) -> str:
    """Return the original code's name of a tensor of transformers' encoder."""
    for ours, theirs in (
        ("model.layers.", "bert.encoder.layers."),
        ("model.", "bert."),
        ("head.", head),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
