"""Classifiers of both kinds against slow computations: heads, pooling, pairs, truncation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from megatron_ettin.evaluation.classifier import (
    Classifier,
    encode,
    load_weights,
    open_classifier,
    outputs,
    save_weights,
    with_labels,
)
from megatron_ettin.evaluation.model import Model, open_model
from tests.conftest import TinyCorpus
from tests.models import write_random_model

TEXTS = [("Short.",), ("A text of more words than that one.",), ("Some words",)]
PAIRS = [("A first text.", "The second"), ("One", "Two and three and four and five and six")]
HEADS = {"encoder": "head", "decoder": "lm_head"}


@pytest.fixture(params=["encoder", "decoder"])
def model(request: pytest.FixtureRequest, tiny_corpus: TinyCorpus, tmp_path: Path) -> Model:
    folder = tmp_path / request.param
    write_random_model(folder, request.param, tiny_corpus.folder / "tokenizer")
    return open_model(str(folder))


def open_for(model: Model, *, num_outputs: int = 3, seed: int = 0) -> Classifier:
    return open_classifier(model, num_outputs=num_outputs, is_regression=False, seed=seed)


def test_all_but_the_output_layer_is_pre_trained(
    model: Model, capfd: pytest.CaptureFixture[str]
) -> None:
    classifier = open_for(model)
    pre_trained = load_file(model.folder / "model.safetensors")
    compared = 0
    for name, tensor in classifier.module.state_dict().items():
        if name.startswith("classifier."):
            continue
        original = name.replace("head.", f"{HEADS[model.name]}.", 1)
        torch.testing.assert_close(tensor, pre_trained[original], rtol=0, atol=0)
        compared += name.startswith("head.")
    assert compared == 2
    assert {name.partition(".")[0] for name in classifier.fresh} == {"classifier"}
    assert capfd.readouterr() == ("", "")


def test_output_layer_is_a_function_of_the_seed(model: Model) -> None:
    first, again, other = (open_for(model, seed=seed).module.classifier for seed in (0, 0, 1))
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


def slow_logits(model: Model, classifier: Classifier, text: str) -> torch.Tensor:
    """Compute the head by hand on one text, from the base model's hidden states."""
    ids = AutoTokenizer.from_pretrained(model.folder)(text)["input_ids"]
    hidden = model.base_model()(torch.tensor([ids])).last_hidden_state[0]
    pooled = hidden[-1] if model.attention == "causal" else hidden.mean(dim=0)
    weights = load_file(model.folder / "model.safetensors")
    head = HEADS[model.name]
    dense = torch.nn.functional.gelu(weights[f"{head}.dense.weight"] @ pooled)
    normed = torch.nn.functional.layer_norm(dense, dense.shape, weights[f"{head}.norm.weight"])
    return classifier.module.classifier(normed)


def test_first_loss_and_outputs_equal_those_of_single_texts(model: Model) -> None:
    classifier, labels = open_for(model), [2, 0, 1]
    features = with_labels(encode(model, TEXTS, max_tokens=128), labels)
    with torch.no_grad():
        expected = torch.stack([slow_logits(model, classifier, text) for (text,) in TEXTS])
    classifier.module.train()
    loss = classifier.module(**classifier.collator(features)).loss
    torch.testing.assert_close(
        loss, cross_entropy(expected, torch.tensor(labels)), rtol=1e-5, atol=1e-5
    )
    found = outputs(classifier, features, batch_size=2)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_pairs_are_separated(model: Model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    encoded = encode(model, PAIRS, max_tokens=128)
    assert encoded.num_cut == 0
    for (first, second), feature in zip(PAIRS, encoded.features, strict=True):
        a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (first, second))
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        end = [] if model.attention == "causal" else [sep]
        assert feature["input_ids"] == [cls, *a, sep, *b, *end]


@pytest.mark.parametrize("texts", [TEXTS, PAIRS])
def test_long_texts_are_cut_and_counted(texts: list[tuple[str, ...]], model: Model) -> None:
    whole = encode(model, texts, max_tokens=128)
    lengths = [len(feature["input_ids"]) for feature in whole.features]
    limit = sorted(lengths)[-1] - 2
    cut = encode(model, texts, max_tokens=limit)
    assert cut.num_cut == sum(length > limit for length in lengths) > 0
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    for before, after in zip(whole.features, cut.features, strict=True):
        assert len(after["input_ids"]) == min(limit, len(before["input_ids"]))
        specials = [
            [i for i in f["input_ids"] if i == tokenizer.sep_token_id] for f in (before, after)
        ]
        assert specials[0] == specials[1]


def test_intermediate_weights_replace_all_but_the_output_layer(
    model: Model, tmp_path: Path
) -> None:
    trained = open_for(model, num_outputs=3, seed=5)
    with torch.no_grad():
        for parameter in trained.module.parameters():
            parameter.add_(1.0)
    save_weights(trained, tmp_path / "weights.safetensors")
    classifier, untouched = open_for(model, num_outputs=2), open_for(model, num_outputs=2)
    load_weights(classifier, tmp_path / "weights.safetensors")
    expected = trained.module.state_dict()
    for name, tensor in classifier.module.state_dict().items():
        if name.startswith("classifier."):
            torch.testing.assert_close(tensor, untouched.module.state_dict()[name], rtol=0, atol=0)
        else:
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
