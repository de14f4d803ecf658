"""Conversion of checkpoints to folders that transformers loads, and back.

Both directions run in one process. A checkpoint is layout-free: one of any TP x PP layout is read
as a whole model here, and one that is written here loads into any layout.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from transformers.utils.logging import disable_progress_bar

from megatron_ettin import checkpoint, checkpoint_files, distributed
from megatron_ettin.checkpoint import RunState, SavedModel
from megatron_ettin.config import HardwareConfig, SeedConfig, check_layout
from megatron_ettin.data.tokenize import Tokenizer, load_tokenizer
from megatron_ettin.export import architecture, unmasking, weights
from megatron_ettin.export.architecture import ModelKind, kind_of, objective_for
from megatron_ettin.export.card import CardMetadata, CardRevision, fills_texts, model_card
from megatron_ettin.export.tokenizer import matching_tokenizer, special_ids, write_tokenizer
from megatron_ettin.export.vocabulary_swap import VocabularySwap, plan_swap
from megatron_ettin.model import weight_map
from megatron_ettin.model.provider import build_stage
from megatron_ettin.model.weight_map import Architecture
from megatron_ettin.publication import begin_folder, publish_folder

logger = logging.getLogger(__name__)

WHOLE = HardwareConfig()
NOTHING_SAID = CardMetadata()
CONFIG_HEADER = """\
# What a converted model decides of a run that continues from it. Pass it with --config, before the
# files that add phases, data and optimizer, and give the folder to --checkpoint.initialize_from.
"""


def to_huggingface(
    folder: Path,
    output: Path,
    *,
    kind: Architecture | None = None,
    check_files: bool = True,
    metadata: CardMetadata = NOTHING_SAID,
) -> SavedModel:
    """Convert the checkpoint in `folder` to a ModernBERT folder, which appears when complete.

    `kind` chooses between the kinds of model that a mixture has trained; the default is that of its
    first objective. `metadata` goes into the model card. With `check_files`, every file's SHA-256
    must be the recorded one. A tokenizer that is gone or changed is left out, with a notice in the
    log.

    Raises:
        ValueError: no usable checkpoint, or not of this kind; or something is at `output` already.
    """
    check_free(output)
    if check_files:
        checkpoint_files.check_files(folder)
    saved, state = checkpoint.read_model(folder), checkpoint.read_state(folder)
    if kind is not None:
        try:
            saved = architecture.as_kind(saved, kind)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
    write_model(output, saved, state, read_weights(folder, saved), metadata=metadata)
    return saved


def write_model(
    output: Path,
    saved: SavedModel,
    state: RunState,
    tensors: dict[str, torch.Tensor],
    *,
    metadata: CardMetadata = NOTHING_SAID,
    revision: CardRevision | None = None,
) -> None:
    """Write a ModernBERT folder of `tensors`, by Hugging Face name; it appears when complete.

    `metadata` and `revision` go into the model card, `state` too.
    """
    kind = kind_of(saved.attention)
    if saved.model.megatron_overrides:
        logger.warning(
            "notice: model.megatron_overrides %s are not converted: check that they leave what is "
            "computed alone",
            saved.model.megatron_overrides,
        )
    tokenizer = matching_tokenizer(saved.tokenizer, state.tokenizer_sha256)
    unfinished = begin_folder(output)
    _write_weights(unfinished, kind, saved, tensors, tokenizer)
    counted = sum(tensor.numel() for name, tensor in tensors.items() if name != weights.TIED)
    card = model_card(
        saved,
        state,
        num_parameters=counted,
        has_tokenizer=tokenizer is not None,
        metadata=metadata,
        revision=revision,
    )
    (unfinished / "README.md").write_text(card, encoding="utf-8")
    if fills_texts(saved):
        shutil.copyfile(unmasking.__file__, unfinished / "unmasking.py")
    if tokenizer is not None:
        write_tokenizer(
            tokenizer,
            unfinished,
            architecture=kind.architecture,
            max_length=saved.max_seq_length,
        )
    publish_folder(output)


def from_huggingface(
    folder: Path,
    output: Path,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    sliding_window: int | None = None,
    prediction_shift: int | None = None,
    tokenizer: Path | None = None,
    tokenizer_sample: Sequence[str] = (),
) -> SavedModel:
    """Convert a ModernBERT-shaped folder to a checkpoint of weights, which appears when complete.

    The sizes are checked against the model and written to the checkpoint's config.yaml; its tensors
    fit any layout. `sliding_window` replaces the window that transformers computes with,
    `prediction_shift` what config.json says of it. `tokenizer` is a folder whose vocabulary the
    model gets, and `tokenizer_sample` raw text for it (`plan_swap`); a notice says what was kept.

    Raises:
        ValueError: naming the field, file or tensor that does not convert, or the size that does
            not fit; or something is at `output` already.
    """
    check_free(output)
    saved = architecture.read_huggingface_config(folder, sliding_window, prediction_shift)
    kind = kind_of(saved.attention)
    hardware = HardwareConfig(
        tensor_parallel_size=tensor_parallel_size, pipeline_parallel_size=pipeline_parallel_size
    )
    files = weights.find_tensors(folder, saved.model, kind.architecture)
    read: Callable[[str], torch.Tensor] = functools.partial(weights.read_tensor, files)
    if tokenizer is None:
        loaded = own_tokenizer(folder)
    else:
        loaded = load_tokenizer(tokenizer)
        saved, read = _swapped(folder, saved, read, plan_swap(folder, tokenizer, tokenizer_sample))
    check_layout(saved.model, hardware)
    if loaded is not None:
        saved = dataclasses.replace(saved, tokenizer=str(loaded.folder.absolute()))
    write_checkpoint(
        output,
        saved,
        read,
        source=folder,
        names_of=kind.architecture,
        tokenizer=loaded,
        hardware=hardware,
    )
    return saved


def _swapped(
    folder: Path,
    saved: SavedModel,
    read: Callable[[str], torch.Tensor],
    swap: VocabularySwap,
) -> tuple[SavedModel, Callable[[str], torch.Tensor]]:
    """Return the model with the new vocabulary, and how its tensors are read."""
    if swap.old_size > saved.model.vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has ids up to {swap.old_size - 1}, but the embedding has "
            f"{saved.model.vocab_size} rows; give the folder the tokenizer that it was trained with"
        )
    tables = {
        entry.encoder
        for entry in weight_map.entries(saved.model.num_layers).values()
        if entry.layout == "vocabulary"
    }

    def read_swapped(name: str) -> torch.Tensor:
        return swap.rows(read(name)) if name in tables else read(name)

    logger.warning("notice: %s", swap.describe())
    model = dataclasses.replace(saved.model, vocab_size=swap.size)
    # The ids that the model named are those of the old tokenizer.
    return dataclasses.replace(saved, model=model, special_ids={}), read_swapped


def write_checkpoint(
    output: Path,
    saved: SavedModel,
    read: Callable[[str], torch.Tensor],
    *,
    source: Path,
    names_of: Architecture,
    tokenizer: Tokenizer | None,
    hardware: HardwareConfig,
) -> None:
    """Write a checkpoint of weights, which `read` returns by the Hugging Face names of a kind.

    `source` is where they come from, for messages; `hardware` goes to the checkpoint's config.yaml.
    """
    with distributed.process_groups(WHOLE):
        stage = build_stage(saved.model, saved.attention, WHOLE, SeedConfig())
        stage.to(distributed.device())
        try:
            weights.fill_parameters(stage, read, names_of)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        checkpoint.save_weights(
            output,
            stage,
            saved=saved,
            config_yaml=_run_sections(saved, hardware),
            tokenizer_sha256=tokenizer.digest if tokenizer is not None else "",
        )


def read_weights(folder: Path, saved: SavedModel) -> dict[str, torch.Tensor]:
    """Return the weights of the checkpoint in `folder`, in float32, by Hugging Face name.

    The tied output is the embedding's tensor under a second name. No digest is compared.
    """
    with distributed.process_groups(WHOLE):
        stage = build_stage(saved.model, saved.attention, WHOLE, SeedConfig())
        stage.to(distributed.device())
        checkpoint.load(folder, stage, None, saved.model)
        return weights.huggingface_tensors(stage, kind_of(saved.attention).architecture)


def _write_weights(
    folder: Path,
    kind: ModelKind,
    saved: SavedModel,
    tensors: dict[str, torch.Tensor],
    tokenizer: Tokenizer | None,
) -> None:
    # Ids that an imported model named itself win: with another eos id, generation would not end.
    ids = {**special_ids(tokenizer, saved.model.vocab_size), **saved.special_ids}
    assumed = {name: ids[name] for name in ids if name not in saved.special_ids}
    if tokenizer is None and assumed:
        logger.warning("notice: without a tokenizer, special token ids are assumed: %s", assumed)
    with torch.device("meta"):
        model = kind.model_class(architecture.huggingface_config(saved, ids))
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    if not sys.stderr.isatty():
        disable_progress_bar()
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        # safetensors creates files with mode 0600, whatever the umask.
        path.chmod((folder / "config.json").stat().st_mode)


def own_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer in a folder, or None, saying why, where there is no usable one."""
    try:
        return load_tokenizer(folder)
    except (ValueError, OSError) as error:
        logger.warning("notice: converted without a tokenizer: %s", error)
        return None


def _run_sections(saved: SavedModel, hardware: HardwareConfig) -> str:
    objective = objective_for(saved)
    sections = {
        "objective": {"class_path": f"{objective.__module__}.{objective.__qualname__}"},
        "model": dataclasses.asdict(saved.model),
        "hardware": {
            "tensor_parallel_size": hardware.tensor_parallel_size,
            "pipeline_parallel_size": hardware.pipeline_parallel_size,
        },
    }
    return CONFIG_HEADER + yaml.safe_dump(sections, sort_keys=False)


def check_free(output: Path) -> None:
    """Raise ValueError if something is at `output` already."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise ValueError(f"{output}: exists already; name another folder or remove it")
