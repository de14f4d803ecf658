"""Files of a continued training: tokenised texts, the model as a checkpoint, the run's YAML.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_ettin.checkpoint import SavedModel
from megatron_ettin.data.encoding import SelectionRules
from megatron_ettin.data.preprocess import preprocess
from megatron_ettin.data.preprocess_options import PreprocessOptions
from megatron_ettin.data.raw_files import expand_inputs
from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.domain.recipe import MASK_RATE, PHASE, DomainRecipe, make_recipe
from megatron_ettin.evaluation.model import open_model
from megatron_ettin.export.architecture import objective_for, read_huggingface_config
from megatron_ettin.export.huggingface import check_free, from_huggingface
from megatron_ettin.model.counts import parameters
from megatron_ettin.objectives.base import MaskingObjective
from megatron_ettin.publication import publish_text

CONFIG, SETTINGS = "run.yaml", "domain.json"
HELD_OUT_SHARE = 0.05
MAX_HELD_OUT_ROWS = 64
#: Slots of a micro-batch by device, if a row is not longer.
MICRO_BATCH_SLOTS = {"cpu": 2048, "cuda": 16_384}


@dataclass(frozen=True, kw_only=True)
class DomainOptions:
    """Options of a continued training."""

    model: Path
    """Hugging Face folder, ModernBERT-shaped."""
    text: Sequence[str]
    """Raw files of the domain."""
    output: Path
    """Folder of everything that is made."""
    general: Sequence[str] = ()
    """Raw files of general text: replayed, and measured before and after."""
    replay: float = 0.1
    """Share of the rows that are general text, if there is any."""
    tokenizer: Path | None = None
    """Tokenizer folder that the model is moved to; None: it keeps its own."""
    seq_length: int | None = None
    """Slots of a row; None: the longest rows that the model is made for."""

    def __post_init__(self) -> None:
        if not 0 <= self.replay < 1:
            raise ValueError(f"--replay {self.replay}: is a share of the rows, in [0, 1)")

    @property
    def replayed(self) -> float:
        """Share of general text in the run."""
        return self.replay if self.general else 0.0


def prepare(options: DomainOptions, say: Callable[[str], None]) -> None:
    """Make what the run needs, and run.yaml last. What is there already is not made again.

    `say` is given lines for the user.

    Raises:
        ValueError, OSError: the model does not convert, its tokenizer does not fit it, there is too
            little text, rows are longer than the model's; or the output was made from other inputs.
    """
    saved = read_huggingface_config(options.model, None, None)
    tokenizer = options.tokenizer or options.model
    _check_tokenizer(options, saved, tokenizer)
    seq_length = options.seq_length or saved.max_seq_length
    if seq_length > saved.max_seq_length:
        raise ValueError(
            f"--seq-length {seq_length}: the model is made for rows of {saved.max_seq_length}; "
            f"extend it first, with another RoPE base (docs/howto.md, Extend an imported model)"
        )
    _claim(options)
    counts = {
        name: _tokenize(options.output / "tokens" / name, texts, tokenizer, say)
        for name, texts in (("domain", options.text), ("general", options.general))
        if texts
    }
    held_out_rows = min(_held_out_rows(name, count, seq_length) for name, count in counts.items())
    recipe = make_recipe(
        num_parameters=parameters(saved.model).total,
        domain_tokens=counts["domain"]["tokens"],
        general_tokens=counts.get("general", Counter[str]())["tokens"],
        replay=options.replayed,
        seq_length=seq_length,
    )
    start = options.output / "start"
    if not start.exists():
        from_huggingface(
            options.model, start, tokenizer=options.tokenizer, tokenizer_sample=options.text
        )
    sections = _sections(options, saved, tokenizer, recipe, held_out_rows)
    publish_text(options.output / CONFIG, yaml.safe_dump(sections, sort_keys=False))
    say(
        f"{options.output / CONFIG}: {recipe.train_tokens:,} tokens in {recipe.num_steps:,} steps "
        f"of {recipe.rows_of_a_step} rows of {recipe.seq_length:,}, peak rate {recipe.lr:g}, "
        f"{options.replayed:.0%} replay"
    )


def _check_tokenizer(options: DomainOptions, saved: SavedModel, tokenizer: Path) -> None:
    """Raise ValueError if the tokenizer cannot be read, or needs a change that is not asked for."""
    size = load_tokenizer(tokenizer).ids.vocab_size
    if options.tokenizer is None and size > saved.model.vocab_size:
        raise ValueError(
            f"{tokenizer / 'tokenizer.json'}: has {size} ids, but the model's embedding has "
            f"{saved.model.vocab_size} rows: not the tokenizer that it was trained with. Put that "
            f"one there, and give this one with --tokenizer to change the vocabulary"
        )


def _claim(options: DomainOptions) -> None:
    """Record what the output is made from, or refuse an output of something else."""
    path = options.output / SETTINGS
    given: dict[str, Any] = {
        "model": str(options.model),
        "model_sha256": open_model(str(options.model)).digest,
        "tokenizer": options.tokenizer and str(options.tokenizer),
        "tokenizer_sha256": load_tokenizer(options.tokenizer or options.model).digest,
    }
    if path.is_file():
        recorded = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in given if recorded.get(name) != given[name]]
        if other:
            raise ValueError(
                f"{path}: {options.output} was made with another {other[0]} "
                f"({recorded.get(other[0])}); choose another --output or remove it"
            )
        return
    check_free(options.output)
    options.output.mkdir(parents=True, exist_ok=True)
    publish_text(path, json.dumps(given, indent=2) + "\n")


def _tokenize(
    prefix: Path, texts: Sequence[str], tokenizer: Path, say: Callable[[str], None]
) -> Counter[str]:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    result = preprocess(
        PreprocessOptions(
            inputs=expand_inputs(texts),
            output_prefix=prefix,
            tokenizer=tokenizer,
            rules=SelectionRules(validation_share=HELD_OUT_SHARE),
        ),
        say=say,
    )
    for line in result.lines():
        say(line)
    (counts,) = result.corpora.values()
    return counts


def _held_out_rows(name: str, counts: Counter[str], seq_length: int) -> int:
    rows = counts["validation_tokens"] // seq_length
    if not rows:
        raise ValueError(
            f"the {name} text is too small: {HELD_OUT_SHARE:.0%} of its documents are held out, "
            f"and their {counts['validation_tokens']:,} tokens fill no row of {seq_length:,}; give "
            f"more documents, or shorter rows (--seq-length)"
        )
    return min(rows, MAX_HELD_OUT_ROWS)


def _sections(
    options: DomainOptions,
    saved: SavedModel,
    tokenizer: Path,
    recipe: DomainRecipe,
    held_out_rows: int,
) -> dict[str, Any]:
    """Return the run's YAML, complete, with absolute paths."""
    output, objective = options.output.absolute(), objective_for(saved)
    arguments = {"mask_rate": MASK_RATE} if issubclass(objective, MaskingObjective) else {}
    names = ["domain", *(["general"] if options.general else [])]
    shares = {"domain": 1 - options.replayed, "general": options.replayed}
    replayed = [name for name in names if shares[name]]
    tokens = output / "tokens"
    size = load_tokenizer(tokenizer).ids.vocab_size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "objective": {
            "class_path": f"{objective.__module__}.{objective.__qualname__}",
            "init_args": arguments,
        },
        "model": {
            **vars(saved.model),
            "vocab_size": size if options.tokenizer else saved.model.vocab_size,
        },
        **recipe.sections(),
        "data": {
            "tokenizer": str(tokenizer.absolute()),
            "sources": {
                name: {"prefix": str(tokens / f"{name}_text_document")} for name in replayed
            },
            "blend": {PHASE: {name: shares[name] for name in replayed}},
            "validation": [str(tokens / f"{name}_text_validation") for name in names],
        },
        "hardware": {
            "micro_batch_tokens": max(MICRO_BATCH_SLOTS[device], recipe.seq_length),
            "precision": "bf16" if device == "cuda" else "fp32",
        },
        "checkpoint": {
            "initialize_from": str(output / "start"),
            "resume": True,
            "save_every_tokens": max(1, recipe.train_tokens // 5),
            "keep": {"last": 1},
        },
        "validation": {
            "every_tokens": max(1, recipe.train_tokens // 10),
            "num_rows": held_out_rows,
            "seq_length": recipe.seq_length,
        },
        "run_dir": str(output / "run"),
    }
