"""Conversion of a ModernBERT folder's tensors to parameters of a whole model here, and back."""

from __future__ import annotations

from collections.abc import Callable, Set
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_ettin.config import ModelConfig
from megatron_ettin.export.safetensors_folder import open_tensors, tensor_files
from megatron_ettin.model import weight_map
from megatron_ettin.model.ettin_model import EttinModel
from megatron_ettin.model.provider import logical_parameters
from megatron_ettin.model.weight_map import Architecture

#: Name of the output layer's weight, and of the embedding that it is tied to. Most files omit it.
TIED, TIED_TO = "decoder.weight", "model.embeddings.tok_embeddings.weight"
#: Prefixes of the tensors that turn hidden states into logits.
HEAD = ("head.", "lm_head.", "decoder.")
#: Types that are read, as safetensors and torch name them.
FLOATING_POINT = {"F16", "BF16", "F32", "F64", "float16", "bfloat16", "float32", "float64"}
#: Message about an output layer that is not tied.
UNTIED = f"tensor {TIED} differs from the embedding: untied outputs have no equivalent here"
#: Number of names that a message lists: the folder of another model would fill screens.
MAX_NAMES = 5


def huggingface_tensors(stage: EttinModel, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Return the model's weights in float32 by Hugging Face name, the tied output included."""
    model = stage.model_config
    table = weight_map.entries(model.num_layers)
    tensors = {}
    for ours, parameter in logical_parameters(stage):
        entry = table[ours]
        names = weight_map.huggingface_names(entry, architecture)
        whole = weight_map.to_huggingface(entry, parameter.detach().float().cpu(), model)
        for name, part in zip(names, whole.chunk(len(names)), strict=True):
            # A copy: safetensors refuses tensors that share memory.
            tensors[name] = part.clone()
    tensors[TIED] = tensors[TIED_TO]
    return tensors


def find_tensors(folder: Path, model: ModelConfig, architecture: Architecture) -> dict[str, Path]:
    """Return the safetensors file of each tensor, after all checks that need no values.

    Raises:
        ValueError: naming the file that is missing or damaged, or the tensor that is missing,
            unexpected, misshapen, not of floating point, or untied.
    """
    shapes = expected_shapes(model, architecture)
    files = tensor_files(folder)
    for path in sorted(set(files.values())):
        with open_tensors(path) as file:
            for name in shapes.keys() & {name for name in files if files[name] == path}:
                view = file.get_slice(name)
                check_tensor(
                    f"{path}: tensor {name}",
                    tuple(view.get_shape()),
                    view.get_dtype(),
                    shapes[name],
                )
    _check_head(folder, set(shapes), set(files))
    check_names(folder, set(shapes), set(files))
    if TIED in files and not torch.equal(read_tensor(files, TIED), read_tensor(files, TIED_TO)):
        raise ValueError(f"{files[TIED]}: {UNTIED}")
    return files


def check_names(where: Path, expected: Set[str], present: Set[str]) -> None:
    """Raise ValueError for missing or unexpected tensors; the tied output is optional."""
    if missing := sorted(expected - present):
        raise ValueError(f"{where}: missing {_listing(missing)}")
    if unexpected := sorted(present - expected - {TIED}):
        raise ValueError(f"{where}: unexpected {_listing(unexpected)}")


def _check_head(folder: Path, expected: Set[str], present: Set[str]) -> None:
    """Raise ValueError for a backbone or a classifier, which has no output layer of its own."""
    # A backbone that was saved by itself names its tensors without the prefix.
    prefix = "" if TIED_TO in present else "model."
    missing = expected - {prefix + name for name in present}
    if missing and all(name.startswith(HEAD) for name in missing):
        raise ValueError(
            f"{folder}: has no language-model head: missing {_listing(sorted(missing))}. Convert "
            f"the model that this backbone or classifier was made from, or load it with "
            f"transformers' class for language models, which adds an untrained head, and save it"
        )


def fill_parameters(
    stage: EttinModel, read: Callable[[str], torch.Tensor], architecture: Architecture
) -> None:
    """Copy tensors, which `read` returns by Hugging Face name, to a whole model's parameters.

    Raises:
        ValueError: naming a tensor that holds NaN or a value outside the range of float32.
    """
    model = stage.model_config
    table = weight_map.entries(model.num_layers)
    for ours, parameter in tqdm(
        logical_parameters(stage), desc="reading", unit=" tensors", disable=None
    ):
        names = weight_map.huggingface_names(table[ours], architecture)
        parts = [read(name).float() for name in names]
        for name, part in zip(names, parts, strict=True):
            if count := int((~torch.isfinite(part)).sum()):
                raise ValueError(
                    f"tensor {name}: {count} of {part.numel()} values are NaN or infinite in "
                    f"float32; take the model from an earlier checkpoint"
                )
        whole = torch.cat(parts)
        with torch.no_grad():
            parameter.copy_(weight_map.from_huggingface(table[ours], whole, model))


def expected_shapes(model: ModelConfig, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a model by Hugging Face name, without the tied output."""
    shapes = {}
    for entry in weight_map.entries(model.num_layers).values():
        rows, *columns = weight_map.huggingface_shape(entry, model)
        names = weight_map.huggingface_names(entry, architecture)
        shapes.update(dict.fromkeys(names, (rows // len(names), *columns)))
    return shapes


def check_tensor(where: str, shape: tuple[int, ...], dtype: str, expected: tuple[int, ...]) -> None:
    """Raise ValueError if a tensor's shape or type is not what the model's configuration says."""
    if shape != expected:
        raise ValueError(f"{where} has shape {shape}; the configuration says {expected}")
    if dtype not in FLOATING_POINT:
        raise ValueError(f"{where} has type {dtype}; only floating point is read")


def read_tensor(files: dict[str, Path], name: str) -> torch.Tensor:
    """Return a tensor from the file that `find_tensors` found it in."""
    with open_tensors(files[name]) as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"tensor {', '.join(names[:MAX_NAMES])}{more}"
