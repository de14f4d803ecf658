"""Contrastive training of encoders of texts by sentence-transformers, for each learning rate.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.evaluation.beir import Collection, ranking_scores
from megatron_ettin.evaluation.randomness import seeded
from megatron_ettin.evaluation.search import search
from megatron_ettin.publication import begin_folder, publish_folder

TRIAL_FILE = "trial.json"
MODEL_FOLDER = "model"


@dataclass(frozen=True, kw_only=True)
class ContrastiveRecipe:
    """Settings of a training run that do not depend on the model."""

    epochs: int
    batch_size: int
    """Pairs in a batch; the documents of the others are a query's negatives."""
    chunk_size: int
    """Texts in a forward pass, in training (GradCache) and in search."""
    warmup: float
    """Share of the steps in which the learning rate rises; then it falls linearly to zero."""
    scale: float
    """Factor of similarities in the softmax."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A finished training run with one learning rate."""

    learning_rate: float
    dev_score: float | None
    """nDCG@10 on the queries that choose the rate; None: the training diverged."""
    loss: float
    """Mean loss of training."""
    folder: Path
    """Folder of the trained encoder; only the best trial's is kept."""


def run_trials(
    make_encoder: Callable[[], Any],
    pairs: Any,
    dev: Collection,
    *,
    recipe: ContrastiveRecipe,
    learning_rates: Sequence[float],
    seed: int,
    scratch: Path,
) -> tuple[Trial, list[Trial]]:
    """Train with each learning rate; return the trial that is best on `dev`, and all of them.

    A finished trial stays in `scratch` and is not run again. Of equal trials the first is best.

    Raises:
        ValueError: training diverged with every learning rate.
    """
    trials: list[Trial] = []
    for rate in learning_rates:
        folder = scratch / f"rate_{rate:g}"
        if not folder.is_dir():
            unfinished = begin_folder(folder)
            with seeded(seed):
                encoder = make_encoder()
                loss = train(encoder, pairs, recipe, rate, seed, unfinished)
                score = _dev_score(encoder, dev, recipe.chunk_size)
            encoder.save_pretrained(str(unfinished / MODEL_FOLDER), create_model_card=False)
            document = {"learning_rate": rate, "dev_score": score, "loss": loss}
            (unfinished / TRIAL_FILE).write_text(json.dumps(document))
            publish_folder(folder)
        fields = json.loads((folder / TRIAL_FILE).read_text())
        trials.append(Trial(folder=folder / MODEL_FOLDER, **fields))
        best = _best(trials)
        for trial in trials:
            if trial is not best:
                shutil.rmtree(trial.folder, ignore_errors=True)
    if best is None:
        raise ValueError("training diverged with every learning rate; lower learning_rates")
    return best, trials


def train(
    encoder: Any,
    pairs: Any,
    recipe: ContrastiveRecipe,
    learning_rate: float,
    seed: int,
    scratch: Path,
) -> float:
    """Train an encoder with the negatives of the batch; return the mean loss.

    `pairs` is a `datasets.Dataset` with the columns anchor, positive and perhaps negative. No text
    comes twice in a batch. On a GPU the passes run in bf16 by autocast.
    """
    from transformers.trainer_callback import PrinterCallback

    trainer_class, arguments_class = _trainer_classes(encoder)
    on_gpu = encoder.device.type == "cuda"
    arguments = arguments_class(
        output_dir=str(scratch),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=learning_rate,
        warmup_steps=recipe.warmup,
        batch_sampler="no_duplicates",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
    )
    trainer = trainer_class(
        model=encoder, args=arguments, train_dataset=pairs, loss=_loss(encoder, recipe)
    )
    trainer.remove_callback(PrinterCallback)
    return float(trainer.train().training_loss)


def _trainer_classes(encoder: Any) -> tuple[Any, Any]:
    import sentence_transformers as library

    if isinstance(encoder, library.MultiVectorEncoder):
        return library.MultiVectorEncoderTrainer, library.MultiVectorEncoderTrainingArguments
    return library.SentenceTransformerTrainer, library.SentenceTransformerTrainingArguments


def _loss(encoder: Any, recipe: ContrastiveRecipe) -> Any:
    """Return the loss; GradCache computes every text twice, so only batches over a chunk use it."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.multi_vector_encoder import losses as multi_vector
    from sentence_transformers.sentence_transformer import losses as single_vector

    chunked = recipe.batch_size > recipe.chunk_size
    options = {"mini_batch_size": recipe.chunk_size} if chunked else {}
    if isinstance(encoder, MultiVectorEncoder):
        loss = (
            multi_vector.CachedMultiVectorMultipleNegativesRankingLoss
            if chunked
            else multi_vector.MultiVectorMultipleNegativesRankingLoss
        )
    else:
        loss = (
            single_vector.CachedMultipleNegativesRankingLoss
            if chunked
            else single_vector.MultipleNegativesRankingLoss
        )
    return loss(encoder, scale=recipe.scale, **options)


def _dev_score(encoder: Any, dev: Collection, batch_size: int) -> float | None:
    try:
        ranking = search(encoder, dev, batch_size=batch_size)
    except FloatingPointError:
        return None
    return ranking_scores(dev.relevance, ranking)["nDCG@10"].value


def _best(trials: Sequence[Trial]) -> Trial | None:
    finished = [trial for trial in trials if trial.dev_score is not None]
    return max(finished, key=lambda trial: trial.dev_score or 0.0, default=None)
