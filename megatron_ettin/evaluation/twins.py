"""A pair of finished runs and their exported models, brought together: all that a report says."""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from megatron_ettin import checkpoint
from megatron_ettin.checkpoint import RunState, SavedModel
from megatron_ettin.checkpoint_files import CheckpointError
from megatron_ettin.config import RunConfig
from megatron_ettin.evaluation.probe import (
    Accuracy,
    LabelledTexts,
    linear_probe,
    majority_label,
    mean_hidden_states,
    read_labelled_texts,
    with_initial_weights,
    word_probe,
)
from megatron_ettin.evaluation.samples import Sample, decoder_samples, encoder_samples
from megatron_ettin.evaluation.unigram import unigram_loss
from megatron_ettin.export.architecture import kind_of
from megatron_ettin.model.provider import Attention
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.training.validation import HeldOutLoss

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Content of a run folder."""

    config: RunConfig
    model: SavedModel
    state: RunState
    training: list[Record]
    """Lines of metrics.jsonl about training intervals."""
    validation: list[Record]
    """Lines of metrics.jsonl about held-out losses."""

    @property
    def seconds(self) -> float:
        """Wall time of the training loop, measuring the held-out loss and saving included."""
        return float(sum(record["seconds"] for record in self.training))

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on in a second of that time."""
        return self.state.consumed_tokens / self.seconds

    @property
    def held_out(self) -> HeldOutLoss:
        """Return the last held-out loss."""
        last = self.validation[-1]
        return HeldOutLoss(
            loss=last["heldout_loss"],
            standard_error=last["heldout_standard_error"],
            scored_tokens=last["scored_tokens"],
        )


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A run, its exported model, and what was measured on them."""

    run: Run
    unigram: HeldOutLoss
    probe: Accuracy
    untrained_probe: Accuracy
    samples: list[Sample]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An encoder and its decoder twin beside each other, and what both are measured against."""

    encoder: Twin
    decoder: Twin
    words: Accuracy
    majority: Accuracy
    versions: dict[str, str]

    @property
    def differing(self) -> list[str]:
        """Return the sections of the configuration that differ, where and when to save aside."""
        sections = [field.name for field in dataclasses.fields(RunConfig)]
        configs = self.encoder.run.config, self.decoder.run.config
        return [
            name
            for name in sections
            if name not in {"run_dir", "checkpoint", "logging"}
            and getattr(configs[0], name) != getattr(configs[1], name)
        ]

    @property
    def twins(self) -> dict[str, Twin]:
        """Return both by name."""
        return {"encoder": self.encoder, "decoder": self.decoder}


def compare(encoder: tuple[Path, Path], decoder: tuple[Path, Path], labelled: Path) -> Comparison:
    """Measure two twins, each given as (run folder, exported folder), with labelled documents.

    Raises:
        ValueError: a run that is not finished or reports no held-out loss, a folder of the other
            kind of model, or labelled documents that cannot be used.
    """
    # Base models leave the head in a folder out; transformers would report that as unexpected.
    set_verbosity_error()
    disable_progress_bar()
    texts = read_labelled_texts(labelled)
    runs = read_run(encoder[0], "bidirectional"), read_run(decoder[0], "causal")
    check_exported(encoder[1], "bidirectional")
    check_exported(decoder[1], "causal")
    return Comparison(
        encoder=_measure(runs[0], encoder[1], texts, encoder_samples(encoder[1])),
        decoder=_measure(runs[1], decoder[1], texts, decoder_samples(decoder[1])),
        words=word_probe(texts),
        majority=majority_label(texts),
        versions=versions(),
    )


def read_run(run_dir: Path, attention: Attention) -> Run:
    """Read a finished run's newest checkpoint and metrics.

    Raises:
        ValueError: no checkpoint, an unfinished run, no held-out loss, or another attention.
    """
    run = RunFolder(run_dir)
    folder = run.newest_checkpoint()
    if folder is None:
        raise CheckpointError(f"{run_dir}: no checkpoint of a run here")
    model, state = checkpoint.read_model(folder), checkpoint.read_state(folder)
    if model.attention != attention:
        raise ValueError(f"{run_dir}: the attention is {model.attention}, expected {attention}")
    if state.g != (end := run.read_order(check_ids=False).num_rows):
        raise ValueError(
            f"{run_dir}: not finished: {state.g} of {end} rows; resume it with --checkpoint.resume"
        )
    records = run.read_metrics()
    training = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "validation"]
    if not validation:
        raise ValueError(f"{run_dir}: reports no held-out loss; name corpora in data.validation")
    return Run(
        config=checkpoint.read_config(folder),
        model=model,
        state=state,
        training=training,
        validation=validation,
    )


def check_exported(folder: Path, attention: Attention) -> None:
    """Raise ValueError unless `folder` holds an exported model of this kind and its tokenizer."""
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing; write it with tools/convert.py to-hf")
    expected = kind_of(attention).config_class.model_type
    model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    if model_type != expected:
        raise ValueError(
            f"{folder / 'config.json'}: model_type is {model_type!r}, expected {expected!r}"
        )


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the numbers."""
    evaluating = {name: metadata.version(name) for name in ("transformers", "scikit-learn")}
    return {"python": platform.python_version(), **checkpoint.package_versions(), **evaluating}


def _measure(run: Run, folder: Path, texts: LabelledTexts, samples: list[Sample]) -> Twin:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trained = AutoModel.from_pretrained(folder).eval()
    untrained = with_initial_weights(trained, run.model, run.config.seeds)
    probes = [
        linear_probe(mean_hidden_states(model, tokenizer, texts.texts), texts)
        for model in (trained, untrained)
    ]
    return Twin(
        run=run,
        unigram=unigram_loss(run.config),
        probe=probes[0],
        untrained_probe=probes[1],
        samples=samples,
    )
