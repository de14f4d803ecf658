"""Linear probe: how well a linear model reads a document's label off a model's mean hidden state.

Beside it stand the references that say what the number is worth: the same model before training,
a bag of words, and the most frequent label.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from megatron_ettin import distributed
from megatron_ettin.checkpoint import SavedModel
from megatron_ettin.config import HardwareConfig, SeedConfig
from megatron_ettin.data.encoding import in_validation
from megatron_ettin.data.raw_files import expand_inputs, read_text_batches
from megatron_ettin.export.architecture import kind_of
from megatron_ettin.export.weights import huggingface_tensors
from megatron_ettin.model.provider import build_model

TEST_SHARE = 0.5
"""Share of the documents that test, by hash of their text; the linear models fit the others."""
INVERSE_REGULARISATION = 1.0
"""scikit-learn's default for LogisticRegression, fixed: nothing is tuned on these labels."""
MAX_TOKENS = 256
"""Tokens kept of a text, special tokens counted."""
BATCH_TOKENS = 2048
"""Positions of a batch, padding counted: few enough for a processor's cache."""


@dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """Documents with labels, and which of them test the probe."""

    texts: list[str]
    labels: NDArray[np.str_]
    is_test: NDArray[np.bool_]

    def kept(self, is_kept: NDArray[np.bool_], path: Path) -> LabelledTexts:
        """Return some of the documents, which came from `path`.

        Raises:
            ValueError: the fitted ones among them have fewer than two labels, or none is a test.
        """
        texts = [text for text, keep in zip(self.texts, is_kept.tolist(), strict=True) if keep]
        labels, is_test = self.labels[is_kept], self.is_test[is_kept]
        fitted_labels = sorted(set(labels[~is_test].tolist()))
        if len(fitted_labels) < 2 or not is_test.any():
            left_out = len(self.texts) - len(texts)
            others = f" ({left_out} more are left out: trained on)" if left_out else ""
            raise ValueError(
                f"{path}: {len(texts)} documents{others}, {int(is_test.sum())} of them for "
                f"the test, the others with labels {fitted_labels}: a probe needs test documents, "
                f"and two labels beside them"
            )
        return LabelledTexts(texts=texts, labels=labels, is_test=is_test)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Test documents that a classifier got right, in the order of the documents."""

    correct: NDArray[np.bool_]

    @property
    def value(self) -> float:
        """Share of right answers."""
        return float(self.correct.mean())

    @property
    def standard_error(self) -> float:
        """Binomial standard error of that share."""
        return math.sqrt(self.value * (1.0 - self.value) / len(self.correct))

    def minus(self, other: Accuracy) -> tuple[float, float]:
        """Return the difference to another classifier on the same documents, and its error.

        The error is that of paired answers, which is smaller than that of two separate samples.
        """
        differences = self.correct.astype(float) - other.correct.astype(float)
        return float(differences.mean()), float(differences.std() / math.sqrt(len(differences)))


def read_labelled_texts(path: Path) -> LabelledTexts:
    """Read the fields `text` and `label` of a file and choose the test documents.

    Copies of a text are on the same side.

    Raises:
        ValueError: as the readers; or where the fitted documents have fewer than two labels.
    """
    batches = list(read_text_batches(expand_inputs([str(path)]), ["text", "label"]))
    texts, names = ([text for batch in batches for text in batch.texts[n]] for n in (0, 1))
    labels = np.array(names)
    # By hash of the text, so that copies are on one side; the prefix makes the choice independent
    # of the corpus' own validation share, which hashes the bare text.
    is_test = np.array([in_validation(f"test\n{text}", TEST_SHARE) for text in texts])
    every = LabelledTexts(texts=texts, labels=labels, is_test=is_test)
    return every.kept(np.ones(len(texts), dtype=np.bool_), path)


def mean_hidden_states(model: Any, tokenizer: Any, texts: Sequence[str]) -> NDArray[np.float32]:
    """Return [n, hidden]: the mean over a text's tokens of the model's last hidden states.

    The tokenizer frames a text as its kind of model was trained: `[CLS] x [SEP]` for an encoder,
    `[CLS] x` for a decoder. The special tokens are seen but not averaged. Texts are cut to
    MAX_TOKENS, or to the model's positions if those are fewer.
    """
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=min(MAX_TOKENS, model.config.max_position_embeddings),
        return_special_tokens_mask=True,
    )
    lengths = [len(ids) for ids in encoded["input_ids"]]
    features = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    with (
        torch.inference_mode(),
        tqdm(
            total=sum(lengths), desc="hidden states", unit="tok", unit_scale=True, disable=None
        ) as bar,
    ):
        for batch in _batches(lengths):
            padded = tokenizer.pad({name: [encoded[name][i] for i in batch] for name in encoded})
            inputs = {
                name: torch.tensor(padded[name], device=model.device)
                for name in ("input_ids", "attention_mask")
            }
            # 1 at the text's own tokens: neither padding nor special tokens.
            special = torch.tensor(padded["special_tokens_mask"], device=model.device)
            averaged = inputs["attention_mask"] * (1 - special)
            hidden = model(**inputs).last_hidden_state
            total = averaged.sum(dim=1, keepdim=True).clamp(min=1)
            features[batch] = ((hidden * averaged[..., None]).sum(dim=1) / total).cpu().numpy()
            bar.update(sum(lengths[i] for i in batch))
    return features


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield indices of texts of like length, so that little of a batch is padding."""
    # Longest first: the first index of a batch has its length.
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, BATCH_TOKENS // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def linear_probe(features: NDArray[np.float32], texts: LabelledTexts) -> Accuracy:
    """Fit logistic regression on standardised features [n, d] and score the test documents."""
    return _score(make_pipeline(StandardScaler(), _classifier()), features, texts)


def word_probe(texts: LabelledTexts) -> Accuracy:
    """Fit the same classifier on TF-IDF weights of words: what whole texts give without a model."""
    weights = TfidfVectorizer().fit(
        [t for t, o in zip(texts.texts, texts.is_test, strict=True) if not o]
    )
    return _score(_classifier(), weights.transform(texts.texts), texts)


def majority_label(texts: LabelledTexts) -> Accuracy:
    """Score the most frequent label of the fitted documents."""
    labels, counts = np.unique(texts.labels[~texts.is_test], return_counts=True)
    return Accuracy(correct=texts.labels[texts.is_test] == labels[counts.argmax()])


def with_initial_weights(model: Any, saved: SavedModel, seeds: SeedConfig) -> Any:
    """Return a copy of a transformers base model with the weights its run started from."""
    hardware = HardwareConfig()
    with distributed.process_groups(hardware):
        stage = build_model(saved.model, saved.attention, hardware, seeds)
        tensors = huggingface_tensors(stage, kind_of(saved.attention).architecture)
    untrained = copy.deepcopy(model)
    base = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    untrained.load_state_dict(base)
    return untrained


def _classifier() -> LogisticRegression:
    return LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000)


def _score(classifier: Any, features: Any, texts: LabelledTexts) -> Accuracy:
    classifier.fit(features[~texts.is_test], texts.labels[~texts.is_test])
    answers = classifier.predict(features[texts.is_test])
    return Accuracy(correct=answers == texts.labels[texts.is_test])
