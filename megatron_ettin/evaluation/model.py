"""Models under evaluation: Hugging Face folders, ours or published; how to read their logits.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.utils import logging

from megatron_ettin.file_digests import FileDigest, FileList
from megatron_ettin.model.counts import Attention

WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
#: Last words of a class in `architectures` of config.json, by how its positions attend.
HEADS: dict[str, Attention] = {"ForMaskedLM": "bidirectional", "ForCausalLM": "causal"}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A folder with a language model and its tokenizer, opened by `open_model`."""

    folder: Path
    name: str
    """Name in results, tables and figures: unique among the models of a comparison."""
    attention: Attention
    prediction_shift: int
    """Positions from the logits that predict a token on to that token: 0 for masked language
    models, 1 for causal ones and for masked next-token prediction (MNTP)."""
    max_tokens: int
    """Longest input, special tokens counted."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the list of the folder's JSON files and weights with their SHA-256."""
        paths = [path for pattern in ("*.json", *WEIGHTS) for path in self.folder.glob(pattern)]
        return FileList({path.name: FileDigest.of_file(path) for path in paths}).sha256

    @property
    def device(self) -> torch.device:
        """Device that models are loaded to: the GPU where there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def tokenizer(self) -> Any:
        """Load the tokenizer, which frames a text as the model was trained.

        That is `[CLS] x [SEP]` for our encoders, and `[CLS] x` for our decoders.
        """
        return AutoTokenizer.from_pretrained(self.folder)

    def language_model(self) -> Any:
        """Load the model with its output layer, in fp32, in evaluation mode."""
        is_causal = self.attention == "causal"
        loader = AutoModelForCausalLM if is_causal else AutoModelForMaskedLM
        return loader.from_pretrained(self.folder, dtype=torch.float32).to(self.device).eval()

    def base_model(self) -> Any:
        """Load the model without its head and output layer, in fp32, in evaluation mode."""
        model = AutoModel.from_pretrained(self.folder, dtype=torch.float32)
        return model.to(self.device).eval()


def open_model(path_or_name: str, name: str | None = None) -> Model:
    """Read what a local folder, or a repository of the Hugging Face Hub, says of its model.

    `name` defaults to the last part of the path.

    Raises:
        ValueError: nothing there, no language model, no weights or no tokenizer.
    """
    folder = _local_folder(path_or_name)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: config.json is missing; give a Hugging Face folder (our checkpoints become "
            f"one by tools/convert.py to-hf)"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        raise ValueError(f"{folder}: no weights (*.safetensors) here")
    if not any((folder / file).is_file() for file in TOKENIZERS):
        raise ValueError(
            f"{folder}: no tokenizer (tokenizer.json) here; copy the one that the model was "
            f"trained with into the folder"
        )
    attention = _attention(path, config)
    return Model(
        folder=folder,
        name=name or Path(path_or_name).name,
        attention=attention,
        prediction_shift=1 if attention == "causal" else config.get("prediction_shift", 0),
        max_tokens=config.get("max_position_embeddings", 512),
    )


def open_models(arguments: Sequence[str]) -> list[Model]:
    """Open models given as FOLDER, as a repository's name, or as NAME=FOLDER.

    Raises:
        ValueError: as `open_model`; or two models have one name.
    """
    models = []
    for argument in arguments:
        name, separator, path = argument.partition("=")
        models.append(open_model(path, name) if separator else open_model(argument))
    names = [model.name for model in models]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several models are called {', '.join(repeated)}; give NAME=FOLDER")
    return models


def _local_folder(path_or_name: str) -> Path:
    """Return the folder itself, or the local copy of a repository, downloaded if need be."""
    folder = Path(path_or_name)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(path_or_name))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path_or_name}: neither a folder nor a repository that can be had: {reason}"
        ) from error


def _attention(path: Path, config: dict[str, Any]) -> Attention:
    architectures = config.get("architectures") or []
    for architecture in architectures:
        for head, attention in HEADS.items():
            if architecture.endswith(head):
                return attention
    raise ValueError(
        f"{path}: architectures is {architectures}; expected a class that ends with "
        f"{' or '.join(HEADS)}: only language models are evaluated"
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars, and its reports of fresh, unused and cut: results note them."""
    verbosity = logging.get_verbosity()
    has_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
