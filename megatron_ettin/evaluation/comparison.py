"""Runs brought together: all that a report says."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from megatron_ettin import checkpoint
from megatron_ettin.evaluation.config_differences import ConfigDifference, config_differences
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
from megatron_ettin.evaluation.reported_run import Measured, ReportedRun, read_run
from megatron_ettin.evaluation.samples import Sample, check_masked_text, continue_text, fill_mask
from megatron_ettin.evaluation.trained_on import trained_on
from megatron_ettin.export.huggingface import to_huggingface
from megatron_ettin.order.run_folder import RunFolder, step_of
from megatron_ettin.versions import package_versions


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Measurements on the weights of every run; none by default."""

    probe: Path | None = None
    """File of labelled documents."""
    masked_texts: Sequence[str] = ()
    """Texts with one [MASK], for runs whose positions attend to both sides."""
    prompts: Sequence[str] = ()
    """Beginnings of texts, for causal runs."""

    def of_weights(self, run: ReportedRun) -> bool:
        """Tell whether a run's weights are needed."""
        texts = self.prompts if is_causal(run) else self.masked_texts
        return self.probe is not None or bool(texts)


@dataclass(frozen=True, kw_only=True)
class ProbeDocuments:
    """Labelled documents of a report, and what is left out or unknown of them."""

    num_documents: int
    """Documents of the file."""
    seen: Mapping[str, int]
    """Documents that each run was trained on: they are left out for all runs."""
    left_out: int
    """Documents that some run was trained on."""
    unknown: Sequence[str]
    """RUN: SOURCE of corpora without sidecars, of which nobody can tell."""
    words: Accuracy
    majority: Accuracy


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs beside each other, at least one, and what they are measured against."""

    runs: Sequence[ReportedRun]
    differences: Sequence[ConfigDifference]
    probe: ProbeDocuments | None
    versions: Mapping[str, str]


def is_causal(run: ReportedRun) -> bool:
    """Tell whether no position of a run's model, as it is exported, attends to later ones."""
    return run.objective.row_shares()[0].objective.attention == "causal"


def compare(folders: Mapping[str, Path], questions: Questions) -> Comparison:
    """Read runs, given by name, and measure what is asked on their newest checkpoints.

    Raises:
        ValueError, OSError: a run cannot be read, or its weights are needed and it has no
            checkpoint or no tokenizer; or the labelled documents or texts cannot be used.
    """
    # Base models leave the head in a folder out; transformers would report that as unexpected.
    set_verbosity_error()
    disable_progress_bar()
    for text in questions.masked_texts:
        check_masked_text(text)
    texts = None if questions.probe is None else read_labelled_texts(questions.probe)
    runs = [read_run(name, folder) for name, folder in folders.items()]
    documents = None
    if texts is not None and questions.probe is not None:
        texts, documents = _without_trained_on(runs, texts, questions.probe)
    measured = [
        replace(run, measured=_measure(run, texts, questions)) if questions.of_weights(run) else run
        for run in runs
    ]
    return Comparison(
        runs=measured,
        differences=config_differences([run.config for run in runs]),
        probe=documents,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the numbers."""
    evaluating = {name: metadata.version(name) for name in ("transformers", "scikit-learn")}
    return {"python": platform.python_version(), **package_versions(), **evaluating}


def _without_trained_on(
    runs: Sequence[ReportedRun], texts: LabelledTexts, path: Path
) -> tuple[LabelledTexts, ProbeDocuments]:
    """Leave out the documents that some run was trained on; all runs get the same ones."""
    is_seen = np.zeros(len(texts.texts), dtype=np.bool_)
    seen, unknown = {}, []
    for run in runs:
        answer = trained_on(run.folder, texts.texts)
        seen[run.name] = int(answer.is_seen.sum())
        unknown += [f"{run.name}: {source}" for source in answer.unknown]
        is_seen |= answer.is_seen
    kept = texts.kept(~is_seen, path)
    return kept, ProbeDocuments(
        num_documents=len(texts.texts),
        seen=seen,
        left_out=int(is_seen.sum()),
        unknown=unknown,
        words=word_probe(kept),
        majority=majority_label(kept),
    )


def _measure(run: ReportedRun, texts: LabelledTexts | None, questions: Questions) -> Measured:
    newest = RunFolder(run.folder).newest_checkpoint()
    if newest is None:
        raise ValueError(f"{run.folder}: no checkpoint, and a probe or texts need weights")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        to_huggingface(newest, folder)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(
                f"{newest}: its tokenizer {run.config.data.tokenizer} is gone or another one; a "
                f"probe or texts need it"
            )
        probes = (None, None) if texts is None else _probes(run, newest, folder, texts)
        return Measured(
            step=step_of(newest) or 0,
            probe=probes[0],
            untrained_probe=probes[1],
            samples=tuple(_samples(run, folder, questions)),
        )


def _probes(
    run: ReportedRun, newest: Path, folder: Path, texts: LabelledTexts
) -> tuple[Accuracy, Accuracy]:
    """Probe the trained and the initial weights."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trained = AutoModel.from_pretrained(folder).eval()
    saved = checkpoint.read_model(newest)
    untrained = with_initial_weights(trained, saved, run.config.seeds)
    first, second = (
        linear_probe(mean_hidden_states(model, tokenizer, texts.texts), texts)
        for model in (trained, untrained)
    )
    return first, second


def _samples(run: ReportedRun, folder: Path, questions: Questions) -> list[Sample]:
    if is_causal(run):
        return continue_text(folder, questions.prompts)
    return fill_mask(folder, questions.masked_texts)
