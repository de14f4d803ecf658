"""Classification of texts by a linear model on hidden states: the quick variant of fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from megatron_ettin.evaluation import probe
from megatron_ettin.evaluation.labelled_data import (
    Example,
    LabelledData,
    class_names,
    class_numbers,
)
from megatron_ettin.evaluation.model import Model, quiet_transformers
from megatron_ettin.evaluation.scores import Score
from megatron_ettin.evaluation.tasks.task import Family, Task, TaskScores, TaskWork

#: Texts whose tokens are counted to estimate those of all.
NUM_SAMPLED = 200


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Task):
    """Logistic regression on the mean of a text's last hidden states; the model is not trained.

    It fits the split `data.train` and is scored on `data.test`, or on `data.validation` where there
    is no test split. Nothing is chosen, so that both are fair. Encoders and decoders pool alike:
    the mean over the text's own tokens, which special tokens are not. The notes hold what a bag of
    words and the most frequent label reach.
    """

    family: ClassVar[Family] = "classification"

    data: LabelledData

    def files(self) -> list[Path]:
        """Return the files of all splits."""
        return self.data.files()

    def check(self) -> None:
        """Read the splits and compare their labels."""
        if len(self.data.text_fields) != 1:
            raise ValueError(
                f"{self.data.path}: text_fields: a linear probe reads one text, not "
                f"{', '.join(self.data.text_fields)}; pairs need FineTuning"
            )
        self._read()

    def work(self, model: Model) -> TaskWork:
        """Estimate the tokens of one pass over all texts."""
        texts = [example.texts[0] for example in self._read()]
        sample = texts[:: math.ceil(len(texts) / NUM_SAMPLED)]
        lengths = [min(length, self._max_tokens(model)) for length in _lengths(model, sample)]
        return TaskWork(forward_tokens=round(sum(lengths) / len(sample) * len(texts)))

    def measure(self, model: Model, *, seed: int, scratch: Path) -> TaskScores:
        """Fit the probe and score its answers; the seed changes nothing."""
        examples = self._read()
        is_test = np.array([self._is_reported(example) for example in examples])
        texts = probe.LabelledTexts(
            texts=[example.texts[0] for example in examples],
            labels=np.array([example.label for example in examples]),
            is_test=is_test,
        )
        features = probe.mean_hidden_states(model.base_model(), model.tokenizer(), texts.texts)
        correct = probe.linear_probe(features, texts).correct
        most_frequent = probe.majority_label(texts).value
        score = Score(
            metric="accuracy",
            items=tuple(example.id for example in examples if self._is_reported(example)),
            predictions=correct.astype(np.float64)[None],
            chance=most_frequent,
        )
        lengths = _lengths(model, texts.texts)
        notes = {
            "bag of words": probe.word_probe(texts).value,
            "most frequent label": most_frequent,
            "tokens kept": self._max_tokens(model),
            "texts cut": sum(length > self._max_tokens(model) for length in lengths),
            "texts": {"fitted": int((~is_test).sum()), "scored": int(is_test.sum())},
        }
        return TaskScores(scores={"accuracy": score}, notes=notes)

    def _read(self) -> list[Example]:
        """Return the examples that are fitted, then those that are scored."""
        fitted = self.data.read(self.data.train)
        names = class_names(fitted)
        if len(names) < 2:
            raise ValueError(
                f"{self.data.path}: all labels of split {self.data.train} are {names[0]}; a probe "
                f"needs two"
            )
        scored = self.data.read(self.data.reported)
        class_numbers(scored, names)
        return fitted + scored

    def _is_reported(self, example: Example) -> bool:
        return example.id.rpartition(":")[0] == self.data.reported

    def _max_tokens(self, model: Model) -> int:
        return min(probe.MAX_TOKENS, model.max_tokens)


def _lengths(model: Model, texts: Sequence[str]) -> list[int]:
    with quiet_transformers():
        return [len(ids) for ids in model.tokenizer()(list(texts))["input_ids"]]
