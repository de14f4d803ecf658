"""Classifiers made of language models, and texts as they read them: all kinds start alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
)

from megatron_ettin.evaluation.model import Model, quiet_transformers
from megatron_ettin.publication import publishing

#: transformers calls a decoder's head `lm_head` in a language model and `head` in a classifier,
#: and would start the classifier with a fresh head. An encoder's is called `head` in both.
RENAMED = {"modernbert-decoder": {r"^lm_head\.": "head."}}
#: Tensors of the last layer, which has a row for each class.
OUTPUT_LAYER = (
    "classifier.weight",
    "classifier.bias",
    "classifier.out_proj.weight",
    "classifier.out_proj.bias",
    "score.weight",
)


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A transformers sequence classifier with what it needs to read texts."""

    module: Any
    """Its weights in fp32. Rows of its output [batch, classes] do not depend on other rows."""
    collator: Any
    """Pads encoded texts on the right, so that no position depends on the batch."""
    fresh: list[str]
    """Names of the tensors that are drawn from the seed; all others are pre-trained."""


@dataclass(frozen=True, kw_only=True)
class EncodedTexts:
    """Texts as token ids."""

    features: list[dict[str, Any]]
    """Arguments of a model's forward pass, for each text."""
    num_cut: int
    """Number of texts that were longer than allowed."""


def open_classifier(
    model: Model, *, num_outputs: int, is_regression: bool, seed: int
) -> Classifier:
    """Load a model with an output layer for `num_outputs` classes, drawn from the seed.

    An encoder pools the mean of its positions, as `classifier_pooling: mean` says. A decoder takes
    the last token that is no padding. Both put the head of their pre-training (dense, activation,
    norm) between the pooled state and the output layer. Models of other families are what
    AutoModelForSequenceClassification makes of them.
    """
    with quiet_transformers():
        config = AutoConfig.from_pretrained(model.folder)
        tokenizer = model.tokenizer()
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        config.num_labels = num_outputs
        config.problem_type = "regression" if is_regression else "single_label_classification"
        config.pad_token_id = tokenizer.pad_token_id
        if model.attention == "causal":
            config.use_cache = False
        elif hasattr(config, "classifier_pooling"):
            config.classifier_pooling = "mean"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module, loading = AutoModelForSequenceClassification.from_pretrained(
                model.folder,
                config=config,
                dtype=torch.float32,
                key_mapping=RENAMED.get(config.model_type),
                output_loading_info=True,
            )
    return Classifier(
        module=module.to(model.device),
        collator=DataCollatorWithPadding(tokenizer),
        fresh=sorted(loading["missing_keys"]),
    )


def save_weights(classifier: Classifier, path: Path) -> None:
    """Publish all weights but the output layer."""
    tensors = {
        name: tensor.contiguous().cpu()
        for name, tensor in classifier.module.state_dict().items()
        if name not in OUTPUT_LAYER
    }
    with publishing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary)


def load_weights(classifier: Classifier, path: Path) -> None:
    """Read the weights that `save_weights` wrote; the output layer stays."""
    tensors = safetensors.torch.load_file(path)
    classifier.module.load_state_dict(tensors, strict=False)


def encode(model: Model, texts: Sequence[tuple[str, ...]], *, max_tokens: int) -> EncodedTexts:
    """Return texts or pairs as a model reads them, cut to `max_tokens`, special tokens counted.

    An encoder reads what its tokenizer makes of a pair: `[CLS] a [SEP] b [SEP]`. A decoder's
    tokenizer would put nothing between the two, so that a decoder reads `[CLS] a [SEP] b`. The
    longer one of a pair is cut first.
    """
    with quiet_transformers():
        tokenizer = model.tokenizer()
        tokenizer.truncation_side = "right"
        if model.attention == "causal" and len(texts[0]) > 1:
            return _encode_causal_pairs(tokenizer, texts, max_tokens)
        columns = [list(column) for column in zip(*texts, strict=True)]
        whole = tokenizer(*columns)
        long = [n for n, ids in enumerate(whole["input_ids"]) if len(ids) > max_tokens]
        for number in long:
            cut = tokenizer(*texts[number], truncation=True, max_length=max_tokens)
            for name in whole:
                whole[name][number] = cut[name]
    features = [{name: whole[name][n] for name in whole} for n in range(len(texts))]
    return EncodedTexts(features=features, num_cut=len(long))


def _encode_causal_pairs(
    tokenizer: Any, texts: Sequence[tuple[str, ...]], max_tokens: int
) -> EncodedTexts:
    separator = tokenizer.eos_token_id if tokenizer.sep_token is None else tokenizer.sep_token_id
    if separator is None:
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer has neither sep_token nor eos_token to "
            f"separate the texts of a pair"
        )
    firsts = tokenizer([first for first, _ in texts])["input_ids"]
    seconds = tokenizer([second for _, second in texts], add_special_tokens=False)["input_ids"]
    features, num_cut = [], 0
    for first, second in zip(firsts, seconds, strict=True):
        surplus = len(first) + 1 + len(second) - max_tokens
        num_cut += surplus > 0
        # The longer one is cut until both are of one length, then each in turn.
        while surplus > 0:
            longer = first if len(first) > len(second) else second
            longer.pop()
            surplus -= 1
        ids = [*first, separator, *second]
        features.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
    return EncodedTexts(features=features, num_cut=num_cut)


def with_labels(encoded: EncodedTexts, labels: Sequence[float]) -> list[dict[str, Any]]:
    """Return the features with the labels that a forward pass computes a loss from."""
    return [
        {**feature, "labels": label}
        for feature, label in zip(encoded.features, labels, strict=True)
    ]


@torch.inference_mode()
def outputs(
    classifier: Classifier, features: Sequence[dict[str, Any]], *, batch_size: int
) -> NDArray[np.float64]:
    """Return the outputs [n, classes], computed in batches of texts of like length."""
    classifier.module.eval()
    order = sorted(range(len(features)), key=lambda n: -len(features[n]["input_ids"]))
    found = np.empty((len(features), classifier.module.config.num_labels))
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        inputs = classifier.collator([features[n] for n in batch]).to(classifier.module.device)
        found[batch] = classifier.module(**inputs).logits.double().cpu().numpy()
    return found
