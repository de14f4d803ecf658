"""The linear probe and the unigram loss against slow and independent references."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderModel,
    ModernBertForMaskedLM,
    ModernBertModel,
)

from megatron_ettin import native
from megatron_ettin.checkpoint import SavedModel
from megatron_ettin.config import ModelConfig, RunConfig, SeedConfig, SourceConfig, load_config
from megatron_ettin.data.orders import open_held_out_order
from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.evaluation import probe
from megatron_ettin.evaluation.probe import Accuracy, LabelledTexts
from megatron_ettin.evaluation.samples import fill_mask, visible
from megatron_ettin.evaluation.unigram import token_counts, unigram_loss
from megatron_ettin.export.tokenizer import write_tokenizer
from megatron_ettin.indexed import IndexedReader, IndexedWriter
from tests.conftest import TinyCorpus

KINDS = {
    "encoder": (ModernBertConfig, ModernBertModel),
    "decoder": (ModernBertDecoderConfig, ModernBertDecoderModel),
}
SHAPE = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 2,
    "vocab_size": 512,
}


def labelled(labels: list[str], is_test: list[bool]) -> LabelledTexts:
    return LabelledTexts(
        texts=[f"{label} {number}" for number, label in enumerate(labels)],
        labels=np.array(labels),
        is_test=np.array(is_test),
    )


@pytest.fixture
def halves() -> LabelledTexts:
    """Return 400 texts with two labels, every other one for the test."""
    rng = np.random.default_rng(0)
    labels = rng.choice(["negative", "positive"], 400).tolist()
    return labelled(labels, [number % 2 == 0 for number in range(400)])


def features(texts: LabelledTexts, separation: float) -> Any:
    """Return 8 noisy numbers a text; the third depends on the label by `separation`."""
    noise = np.random.default_rng(1).normal(size=(len(texts.texts), 8))
    noise[:, 2] += separation * (texts.labels == "positive")
    return (noise * 100 + 5000).astype(np.float32)  # a probe must not care about the scale


def test_separable_features_are_read_off(halves: LabelledTexts) -> None:
    accuracy = probe.linear_probe(features(halves, 12.0), halves)
    assert accuracy.value == 1.0
    assert len(accuracy.correct) == 200


def test_noise_is_not(halves: LabelledTexts) -> None:
    accuracy = probe.linear_probe(features(halves, 0.0), halves)
    assert abs(accuracy.value - 0.5) < 4 * accuracy.standard_error


def test_words_are_read_off(halves: LabelledTexts) -> None:
    assert probe.word_probe(halves).value == 1.0


def test_majority_is_that_of_the_fitted_documents() -> None:
    texts = labelled(["a", "b", "b", "a", "a", "a"], [False, False, False, True, True, True])
    assert probe.majority_label(texts).value == 0.0


def test_errors_of_an_accuracy() -> None:
    right = Accuracy(correct=np.array([True] * 30 + [False] * 10))
    other = Accuracy(correct=np.array([True] * 25 + [False] * 10 + [True] * 5))
    assert right.value == 0.75
    assert right.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 40))
    difference, error = right.minus(other)
    assert (difference, right.minus(right)) == (0.0, (0.0, 0.0))
    assert error == pytest.approx(math.sqrt(10 / 40 / 40))  # ten answers differ, five each way


def write_labelled(path: Path, records: list[tuple[str, str]]) -> Path:
    lines = [json.dumps({"text": text, "label": label}) for text, label in records]
    path.write_text("\n".join(lines))
    return path


def test_copies_of_a_text_are_on_one_side(tmp_path: Path) -> None:
    records = [(f"review {number % 50}", "ab"[number % 2]) for number in range(200)]
    texts = probe.read_labelled_texts(write_labelled(tmp_path / "x.jsonl", records))
    sides = dict(zip(texts.texts, texts.is_test.tolist(), strict=True))
    assert [sides[text] for text in texts.texts] == texts.is_test.tolist()
    assert 0 < texts.is_test.sum() < 200


@pytest.mark.parametrize("count", [1, 40])
def test_one_label_is_refused(count: int, tmp_path: Path) -> None:
    path = write_labelled(tmp_path / "x.jsonl", [(f"review {n}", "good") for n in range(count)])
    with pytest.raises(ValueError, match=r"x\.jsonl: .* a probe needs"):
        probe.read_labelled_texts(path)


@pytest.fixture(params=KINDS)
def exported(request: pytest.FixtureRequest, tiny_corpus: TinyCorpus, tmp_path: Path) -> Path:
    """Return a folder with a random small model of each kind, and its tokenizer."""
    config_class, model_class = KINDS[request.param]
    tokenizer = load_tokenizer(tiny_corpus.folder / "tokenizer")
    torch.manual_seed(0)
    config = config_class(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["hidden_size"],
        intermediate_size=SHAPE["ffn_hidden_size"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_attention_heads"],
        max_position_embeddings=48,
        local_attention=8,
        pad_token_id=3,
        initializer_range=0.2,
    )
    model_class(config).save_pretrained(tmp_path)
    write_tokenizer(tokenizer, tmp_path, architecture=request.param, max_length=48)
    return tmp_path


def test_features_are_means_over_the_own_tokens(
    exported: Path, tiny_corpus: TinyCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text at a time, without padding; [CLS] and [SEP] are seen and not averaged."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModel.from_pretrained(exported).eval()
    corpus = IndexedReader(str(tiny_corpus.folder / "beta"))
    texts = [tokenizer.decode(corpus[document]) for document in range(20)]
    monkeypatch.setattr(probe, "BATCH_TOKENS", 128)
    found = probe.mean_hidden_states(model, tokenizer, texts)
    lengths = set()
    for text, row in zip(texts, found, strict=True):
        ids = tokenizer(text)["input_ids"]
        framed = ids[-1] == tokenizer.sep_token_id
        if len(ids) > 48:
            ids = [*ids[:47], tokenizer.sep_token_id] if framed else ids[:48]
        lengths.add(len(ids))
        with torch.inference_mode():
            hidden = model(torch.tensor([ids])).last_hidden_state[0]
        expected = hidden[1:-1] if framed else hidden[1:]
        np.testing.assert_allclose(row, expected.mean(dim=0).numpy(), rtol=1e-4, atol=1e-5)
    assert max(lengths) == 48
    assert min(lengths) < 30


@pytest.mark.parametrize("shift", [0, 1])
def test_masks_are_filled_from_where_the_model_predicts_them(
    shift: int, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    config = ModernBertConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=48,
        pad_token_id=3,
        initializer_range=0.2,
    )
    if shift:
        config.prediction_shift = shift
    torch.manual_seed(0)
    ModernBertForMaskedLM(config).save_pretrained(tmp_path)
    corpus = load_tokenizer(tiny_corpus.folder / "tokenizer")
    write_tokenizer(corpus, tmp_path, architecture="encoder", max_length=48)
    model = ModernBertForMaskedLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["Water boils at a [MASK] degrees.", "[MASK] is the first word."]
    found = {sample.given: sample.answer for sample in fill_mask(tmp_path, texts)}
    assert list(found) == texts
    for text, answer in found.items():
        ids = tokenizer(text)["input_ids"]
        place = ids.index(tokenizer.mask_token_id)
        with torch.inference_mode():
            shares = model(torch.tensor([ids])).logits[0, place - shift].softmax(dim=0)
        expected = [f"({share:.1%})" for share in shares.topk(5).values.tolist()]
        assert re.findall(r"\(\d+\.\d%\)", answer) == expected
        best = visible(tokenizer.decode([int(shares.argmax())]))
        assert answer.startswith(best)


def test_initial_weights_are_those_of_the_run(exported: Path) -> None:
    model = AutoModel.from_pretrained(exported)
    attention = "causal" if isinstance(model, ModernBertDecoderModel) else "bidirectional"
    saved = SavedModel(
        model=ModelConfig(**SHAPE),  # type: ignore[arg-type]
        attention=attention,  # type: ignore[arg-type]
        rotary_base_global=10_000.0,
        rotary_base_local=10_000.0,
        max_seq_length=48,
        tokenizer=None,
    )
    untrained = probe.with_initial_weights(model, saved, SeedConfig(init=5))
    for name, parameter in (
        ("model.embeddings.tok_embeddings.weight", untrained.embeddings.tok_embeddings.weight),
        ("model.layers.1.mlp.Wi.weight", untrained.layers[1].mlp.Wi.weight),
    ):
        expected = native.initial_weights(name, 5, 0, parameter.numel(), std=0.02)
        np.testing.assert_allclose(parameter.detach().numpy().ravel(), expected, atol=1e-7)
    assert not torch.equal(untrained.layers[1].mlp.Wi.weight, model.layers[1].mlp.Wi.weight)


def make_run(corpus: TinyCorpus, path: Path, objective: str, num_rows: int) -> RunConfig:
    sections = {"objective": objective, "run_dir": "run"}
    validation = {"num_rows": num_rows, "seq_length": 128}
    return load_config(corpus.write_config(path, **sections, validation=validation))


def test_counts_are_of_tokens_and_document_ends(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    config = make_run(tiny_corpus, tmp_path / "run.yaml", "CausalLM", 8)
    ids = open_held_out_order(config).ids
    expected: Counter[int] = Counter()
    for name in ("alpha", "beta"):
        for document in IndexedReader(str(tiny_corpus.folder / name)):
            expected.update([*document.tolist(), ids.sep])
    counts = token_counts(config.data.sources, ids)
    assert dict(enumerate(counts.tolist())) == {n: expected[n] for n in range(ids.vocab_size)}


def test_present_specials_are_counted_as_they_are(tmp_path: Path, tiny_corpus: TinyCorpus) -> None:
    ids = open_held_out_order(make_run(tiny_corpus, tmp_path / "run.yaml", "CausalLM", 8)).ids
    with IndexedWriter(str(tmp_path / "framed"), "uint16") as writer:
        writer.add(np.array([ids.cls, 7, ids.sep]))
    source = SourceConfig(prefix=str(tmp_path / "framed"), specials="present")
    assert token_counts({"framed": source}, ids)[[ids.cls, 7, ids.sep]].tolist() == [1, 1, 1]


def reference_nats(config: RunConfig, vocab_size: int, sep: int) -> list[float]:
    """Return -log p of each token, counted in a plain loop, with one count added to each."""
    counts = [1] * vocab_size
    for source in config.data.sources.values():
        for document in IndexedReader(source.prefix):
            for token in [*document.tolist(), sep]:
                counts[token] += 1
    return [-math.log(count / sum(counts)) for count in counts]


def test_unigram_loss_of_a_causal_run(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """One epoch of rows scores every token of the held-out documents, and each one's end, once."""
    rows = open_held_out_order(
        make_run(tiny_corpus, tmp_path / "a.yaml", "CausalLM", 1)
    ).spec.phases[0]
    config = make_run(tiny_corpus, tmp_path / "b.yaml", "CausalLM", rows.pools[0].rows)
    ids = open_held_out_order(config).ids
    nats = reference_nats(config, ids.vocab_size, ids.sep)
    scored = [
        token
        for document in IndexedReader(config.data.validation[0])
        for token in [*document.tolist(), ids.sep]
    ]
    found = unigram_loss(config)
    assert found.scored_tokens == len(scored)
    assert found.loss == pytest.approx(sum(nats[token] for token in scored) / len(scored))
    assert 0.0 < found.standard_error < 0.5


def test_unigram_loss_of_a_diffusion_run(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """An estimate, from the masks that there are, of the mean over all tokens but special ones."""
    config = make_run(tiny_corpus, tmp_path / "run.yaml", "MaskedDiffusion", 64)
    order = open_held_out_order(config)
    nats = reference_nats(config, order.ids.vocab_size, order.ids.sep)
    tokens = order.rows(0, np.arange(64, dtype=np.int64)).tokens
    ordinary = [nats[token] for token in tokens if token not in order.ids.special]
    found = unigram_loss(config)
    assert found.scored_tokens == len(ordinary)
    assert found.loss == pytest.approx(sum(ordinary) / len(ordinary), rel=0.1)
    assert found.loss != pytest.approx(sum(ordinary) / len(ordinary), rel=1e-4)


def test_unigram_loss_of_a_masked_run(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """The scored tokens are those the masks select: about 30 % of the tokens, and no special."""
    config = make_run(tiny_corpus, tmp_path / "run.yaml", "MaskedLM", 16)
    order = open_held_out_order(config)
    nats = reference_nats(config, order.ids.vocab_size, order.ids.sep)
    whole = order.rows(0, np.arange(16, dtype=np.int64))
    batch = config.objective.make_batch(
        whole, phase="validation", mask_seed=config.seeds.mask, ids=order.ids
    )
    losses = [nats[token] for token in batch.labels[batch.loss_mask]]
    found = unigram_loss(config)
    assert found.scored_tokens == len(losses)
    assert found.scored_tokens / whole.num_tokens.sum() == pytest.approx(0.3, abs=0.05)
    assert found.loss == pytest.approx(sum(losses) / len(losses))
