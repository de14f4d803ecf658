"""Classification and regression of texts by fine-tuning, as GLUE is measured."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.evaluation.classifier import (
    Classifier,
    EncodedTexts,
    encode,
    load_weights,
    open_classifier,
    outputs,
    save_weights,
    with_labels,
)
from megatron_ettin.evaluation.classifier_training import FineTuningRecipe, TrainedClassifier, train
from megatron_ettin.evaluation.labelled_data import (
    Example,
    LabelledData,
    class_names,
    class_numbers,
    label_values,
)
from megatron_ettin.evaluation.model import Model
from megatron_ettin.evaluation.scores import Score
from megatron_ettin.evaluation.tasks.task import Family, Task, TaskScores, TaskWork
from megatron_ettin.publication import publish_text

Metric = Literal["accuracy", "F1", "Matthews correlation", "Spearman correlation"]
#: Metric of numbers; the others are of classes.
REGRESSION: Metric = "Spearman correlation"
#: Texts whose tokens are counted to estimate those of a split.
NUM_SAMPLED = 200
#: Batches that trained models predict the reported split in.
PREDICTION_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Intermediate:
    """A data set that a model is fine-tuned on before the data set that is measured."""

    data: LabelledData
    learning_rate: float = 5e-5
    weight_decay: float = 5e-6
    num_epochs: int = 1
    batch_size: int = 64
    evaluation_steps: int | None = 2300
    """Steps from one evaluation to the next; None: one epoch's."""


@dataclass(frozen=True, kw_only=True)
class FineTuning(Task):
    """Fine-tuning of a classifier on labelled texts: a grid of trials, of which the best counts.

    The grid, batch, optimizer, warmup and early stopping default to those of ModernBERT (paper,
    appendix E.1, and its repository's src/evals/glue_jobs.py). The best trial is the one with the
    highest value of the first metric on the split `data.validation`. Its scores are those on
    `data.test`; without a test split they are of the validation split, as published values of GLUE
    are, which is optimistic, and the notes say so.

    All arms start alike. transformers' classifier keeps an encoder's pre-trained head (dense,
    activation, norm) and would give a decoder a fresh one; here both keep the pre-trained one, and
    only the output layer is fresh, drawn from the seed. An encoder pools the mean of all its
    positions. A decoder takes its last token. A decoder reads pairs as `[CLS] a [SEP] b`, an
    encoder as `[CLS] a [SEP] b [SEP]`.
    """

    family: ClassVar[Family] = "classification"

    data: LabelledData
    metrics: Sequence[Metric] = ("accuracy",)
    """Scores to report; trials are chosen by the first one. `Spearman correlation` belongs to
    labels that are numbers, the others to classes. F1 is that of the last of two classes."""
    learning_rates: Sequence[float] = (1e-5, 3e-5, 5e-5, 8e-5)
    weight_decays: Sequence[float] = (1e-6, 5e-6, 8e-6, 1e-5)
    """Shares of a weight that a step at the peak of the learning rate removes."""
    num_epochs: Sequence[int] = (1, 2, 3)
    batch_size: int = 16
    max_length: int = 256
    """Tokens kept of a text or pair, special tokens counted; the model's limit if that is lower."""
    warmup_share: float = 0.06
    """Share of the steps in which the learning rate rises."""
    evaluation_steps: int | None = None
    """Steps from one evaluation on the validation split to the next; None: one epoch's."""
    patience: int = 3
    """Evaluations in a row without a better value that end a trial."""
    starts_from: Intermediate | None = None
    """Data set to fine-tune on first, such as MNLI for RTE, MRPC and STS-B. Each measurement does
    it by itself, with one recipe; the output layer is fresh again afterwards."""

    def __post_init__(self) -> None:
        if not (self.metrics and self.learning_rates and self.weight_decays and self.num_epochs):
            raise ValueError(
                "metrics, learning_rates, weight_decays and num_epochs need a value each"
            )
        if REGRESSION in self.metrics and len(self.metrics) > 1:
            raise ValueError(f"metrics: {REGRESSION} is of numbers, the others are of classes")

    @property
    def is_regression(self) -> bool:
        """Tell whether labels are numbers to predict."""
        return REGRESSION in self.metrics

    @property
    def recipes(self) -> list[FineTuningRecipe]:
        """Return the trials of the grid."""
        grid = itertools.product(self.learning_rates, self.weight_decays, self.num_epochs)
        return [
            FineTuningRecipe(
                learning_rate=rate,
                weight_decay=decay,
                num_epochs=epochs,
                batch_size=self.batch_size,
                warmup_share=self.warmup_share,
                evaluation_steps=self.evaluation_steps,
                patience=self.patience,
            )
            for rate, decay, epochs in grid
        ]

    def files(self) -> list[Path]:
        """Return the files of all splits, those of `starts_from` included."""
        return self.data.files() + (self.starts_from.data.files() if self.starts_from else [])

    def check(self) -> None:
        """Read all splits and compare their labels."""
        targets = _Targets.read(self.data, is_regression=self.is_regression)
        if "F1" in self.metrics and len(targets.names) != 2:
            raise ValueError(
                f"{self.data.path}: F1 is of two classes; there are {len(targets.names)}: "
                f"{', '.join(targets.names[:10])}"
            )
        if self.starts_from:
            _Targets.read(self.starts_from.data, is_regression=False)

    def work(self, model: Model) -> TaskWork:
        """Estimate the tokens of all trials, none of them ended early."""
        train_tokens, validation_tokens, *test_tokens = self._tokens(model, self.data)
        epochs = sum(recipe.num_epochs for recipe in self.recipes)
        num_batches = math.ceil(len(self.data.read(self.data.train)) / self.batch_size)
        evaluations = epochs * num_batches // (self.evaluation_steps or num_batches)
        trained = epochs * train_tokens
        if self.starts_from:
            trained += self.starts_from.num_epochs * self._tokens(model, self.starts_from.data)[0]
        forward = evaluations * validation_tokens + len(self.recipes) * sum(test_tokens)
        return TaskWork(forward_tokens=forward, trained_tokens=trained)

    def measure(self, model: Model, *, seed: int, scratch: Path) -> TaskScores:
        """Train the trials that `scratch` does not hold yet, and score the best one."""
        targets = _Targets.read(self.data, is_regression=self.is_regression)
        encoded = targets.encoded(model, self._max_tokens(model))
        trials = []
        for number, recipe in enumerate(self.recipes):
            path = scratch / f"trial_{number}.json"
            if not path.is_file():
                classifier = self._start(model, targets, seed=seed, scratch=scratch)
                trial = self._trial(classifier, recipe, targets, encoded, seed=seed)
                publish_text(path, json.dumps({**trial, "fresh": classifier.fresh}))
            trials.append(json.loads(path.read_text(encoding="utf-8")))
        best = max(trials, key=lambda trial: trial["value"])
        notes = {
            "chosen": best["recipe"],
            "chosen by": f"{self.metrics[0]} on {self.data.validation}",
            "trials": [
                {name: trial[name] for name in ("recipe", "value", "best_step", "num_steps")}
                for trial in trials
            ],
            "tensors not pre-trained": best["fresh"],
            "tokens kept": self._max_tokens(model),
            "texts cut": {split: encoded[split].num_cut for split in encoded},
            "texts": {split: len(encoded[split].features) for split in encoded},
        }
        if self.data.test is None:
            notes["optimistic"] = "chosen and reported on the same documents"
        scores = targets.scores(self.metrics, self.data.reported, np.array(best["outputs"]))
        return TaskScores(scores=scores, notes=notes)

    def _trial(
        self,
        classifier: Classifier,
        recipe: FineTuningRecipe,
        targets: _Targets,
        encoded: Mapping[str, EncodedTexts],
        *,
        seed: int,
    ) -> dict[str, Any]:
        training = self._train(
            classifier, recipe, self.data, targets, encoded, self.metrics[0], seed=seed
        )
        found = training.outputs
        if self.data.test is not None:
            features = encoded[self.data.test].features
            found = outputs(classifier, features, batch_size=PREDICTION_BATCH)
        return {
            "recipe": dataclasses.asdict(recipe),
            "value": training.value,
            "best_step": training.best_step,
            "num_steps": training.num_steps,
            "outputs": found.tolist(),
        }

    def _train(
        self,
        classifier: Classifier,
        recipe: FineTuningRecipe,
        data: LabelledData,
        targets: _Targets,
        encoded: Mapping[str, EncodedTexts],
        metric: Metric,
        *,
        seed: int,
    ) -> TrainedClassifier:
        def value(found: NDArray[np.float64]) -> float:
            return targets.scores([metric], data.validation, found)[metric].value

        return train(
            classifier,
            recipe,
            train_features=with_labels(encoded[data.train], targets.labels[data.train]),
            validation_features=encoded[data.validation].features,
            value=value,
            seed=seed,
        )

    def _start(self, model: Model, targets: _Targets, *, seed: int, scratch: Path) -> Classifier:
        """Return the classifier that each trial starts from."""
        classifier = open_classifier(
            model,
            num_outputs=targets.num_outputs,
            is_regression=self.is_regression,
            seed=seed,
        )
        if self.starts_from is not None:
            path = scratch / "intermediate.safetensors"
            if not path.is_file():
                self._train_intermediate(model, self.starts_from, seed=seed, path=path)
            load_weights(classifier, path)
        return classifier

    def _train_intermediate(
        self, model: Model, intermediate: Intermediate, *, seed: int, path: Path
    ) -> None:
        data = intermediate.data
        targets = _Targets.read(data, is_regression=False)
        encoded = targets.encoded(model, self._max_tokens(model))
        classifier = open_classifier(
            model, num_outputs=targets.num_outputs, is_regression=False, seed=seed
        )
        recipe = FineTuningRecipe(
            learning_rate=intermediate.learning_rate,
            weight_decay=intermediate.weight_decay,
            num_epochs=intermediate.num_epochs,
            batch_size=intermediate.batch_size,
            warmup_share=self.warmup_share,
            evaluation_steps=intermediate.evaluation_steps,
            patience=self.patience,
        )
        self._train(classifier, recipe, data, targets, encoded, "accuracy", seed=seed)
        save_weights(classifier, path)

    def _max_tokens(self, model: Model) -> int:
        return min(self.max_length, model.max_tokens)

    def _tokens(self, model: Model, data: LabelledData) -> list[int]:
        """Estimate the tokens of each split by those of a sample."""
        counts = []
        for split in data.splits:
            texts = [example.texts for example in data.read(split)]
            sample = texts[:: math.ceil(len(texts) / NUM_SAMPLED)]
            features = encode(model, sample, max_tokens=self._max_tokens(model)).features
            mean = sum(len(feature["input_ids"]) for feature in features) / len(sample)
            counts.append(round(mean * len(texts)))
        return counts


@dataclass(frozen=True, kw_only=True)
class _Targets:
    """Examples and labels of all splits of a data set."""

    examples: Mapping[str, list[Example]]
    labels: Mapping[str, Sequence[float]]
    names: Sequence[str]
    """Names of the classes; none for numbers to predict."""

    @classmethod
    def read(cls, data: LabelledData, *, is_regression: bool) -> _Targets:
        examples = {split: data.read(split) for split in data.splits}
        if is_regression:
            labels = {split: label_values(found) for split, found in examples.items()}
            return cls(examples=examples, labels=labels, names=())
        names = class_names(examples[data.train])
        if len(names) < 2:
            raise ValueError(
                f"{data.path}: all labels of split {data.train} are {names[0]}; two are needed"
            )
        numbers = {split: class_numbers(found, names) for split, found in examples.items()}
        return cls(examples=examples, labels=numbers, names=names)

    @property
    def num_outputs(self) -> int:
        return len(self.names) or 1

    def encoded(self, model: Model, max_tokens: int) -> dict[str, EncodedTexts]:
        """Return the texts of all splits as the model reads them."""
        return {
            split: encode(model, [example.texts for example in found], max_tokens=max_tokens)
            for split, found in self.examples.items()
        }

    def scores(
        self, metrics: Sequence[Metric], split: str, found: NDArray[np.float64]
    ) -> dict[str, Score]:
        """Return the scores of outputs [n, classes] on a split, by metric."""
        items = tuple(example.id for example in self.examples[split])
        labels = np.array(self.labels[split], dtype=np.float64)
        answers = found.argmax(axis=1).astype(np.float64) if self.names else found[:, 0]
        return dict(_scores(metrics, items, answers, labels))


def _scores(
    metrics: Sequence[Metric],
    items: tuple[str, ...],
    answers: NDArray[np.float64],
    labels: NDArray[np.float64],
) -> Iterator[tuple[str, Score]]:
    for metric in metrics:
        if metric == "accuracy":
            most_frequent = Counter(labels.tolist()).most_common(1)[0][1]
            yield (
                metric,
                Score(
                    metric=metric,
                    items=items,
                    predictions=(answers == labels).astype(np.float64)[None],
                    chance=most_frequent / len(labels),
                ),
            )
        else:
            yield (
                metric,
                Score(
                    metric=metric,
                    items=items,
                    predictions=answers[None],
                    references=labels,
                    chance=None if metric == "F1" else 0.0,
                ),
            )
