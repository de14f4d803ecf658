"""Winogender: preferred pronouns computed by hand, the gotcha split, and faults in the files."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from megatron_ettin.evaluation.model import Model, open_model
from megatron_ettin.evaluation.tasks.winogender import GENDERS, Winogender
from tests.conftest import TinyCorpus
from tests.models import Kind, write_random_model

#: (identity, sentence before the pronoun, pronouns, sentence after it by gender)
SCHEMAS: list[tuple[str, str, tuple[str, str, str], tuple[str, str, str]]] = [
    (f"{job}.{who}.{answer}", f"The {job} told {who} that", pronouns, after)
    for job, who in itertools.product(("nurse", "plumber"), ("patient", "someone"))
    for answer, pronouns, after in (
        ("0", ("he", "she", "they"), ("was late.", "was late.", "were late.")),
        ("1", ("his", "her", "their"), 3 * ("work could go on and on.",)),
    )
]
STATISTICS = "occupation\tbergsma_pct_female\tbls_pct_female\nnurse\t4.0\t90.0\nplumber\t60\t1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "winogender"
    folder.mkdir()
    lines = [
        f"{identity}.{gender}.txt\t{before} {pronoun} {rest}"
        for identity, before, pronouns, after in SCHEMAS
        for gender, pronoun, rest in zip(GENDERS, pronouns, after, strict=True)
    ]
    (folder / "all_sentences.tsv").write_text("\n".join(["sentid\tsentence", *lines]) + "\n")
    (folder / "occupations-stats.tsv").write_text(STATISTICS)
    return folder


def write_model(tiny_corpus: TinyCorpus, folder: Path, kind: Kind, shift: int = 0) -> Model:
    tokenizer = tiny_corpus.folder / "tokenizer"
    return open_model(str(write_random_model(folder, kind, tokenizer, prediction_shift=shift)))


def masked_value(model: Model, language_model: Any, tokenizer: Any, number: int, k: int) -> float:
    """Fill the masks of a pronoun from the left, one forward pass a token."""
    identity, before, pronouns, after = SCHEMAS[number]
    gotcha = 0 if identity.startswith("nurse") else 1
    prefix, pronoun, suffix = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (before, f" {pronouns[k]}", f" {after[gotcha]}")
    )
    ids = [
        tokenizer.cls_token_id,
        *prefix,
        *len(pronoun) * [tokenizer.mask_token_id],
        *suffix,
        tokenizer.sep_token_id,
    ]
    total = 0.0
    for place, token in enumerate(pronoun, start=1 + len(prefix)):
        with torch.no_grad():
            logits = language_model(torch.tensor([ids])).logits[0, place - model.prediction_shift]
        total += float(logits.log_softmax(0)[token])
        ids[place] = token
    return total


@pytest.mark.parametrize("shift", [0, 1])
def test_encoders_fill_the_masked_pronoun(
    shift: int, folder: Path, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    model = write_model(tiny_corpus, tmp_path / "model", "encoder", shift)
    found = Winogender(folder=str(folder)).measure(model, seed=0, scratch=tmp_path)
    language_model = AutoModelForMaskedLM.from_pretrained(model.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    best = [
        int(np.argmax([masked_value(model, language_model, tokenizer, n, k) for k in range(3)]))
        for n in range(len(SCHEMAS))
    ]
    check(found.scores, best)
    assert found.notes["longest pronoun in tokens"] > 1
    assert found.notes["schemas whose verb agrees"] == 4
    assert found.notes["ties"] == 0


def test_decoders_prefer_the_lowest_perplexity(
    folder: Path, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    model = write_model(tiny_corpus, tmp_path / "model", "decoder")
    found = Winogender(folder=str(folder)).measure(model, seed=0, scratch=tmp_path)
    language_model = AutoModelForCausalLM.from_pretrained(model.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    best = []
    for _, before, pronouns, after in SCHEMAS:
        perplexities = []
        for pronoun, rest in zip(pronouns, after, strict=True):
            ids = torch.tensor([tokenizer(f"{before} {pronoun} {rest}")["input_ids"]])
            with torch.no_grad():
                # transformers' own loss: the mean over all tokens but the first, [CLS]
                perplexities.append(float(language_model(ids, labels=ids).loss.exp()))
        best.append(int(np.argmin(perplexities)))
    check(found.scores, best)


def check(scores: Any, best: list[int]) -> None:
    assert list(scores) == ["neutral", "male", "female", "accuracy"]
    for name in GENDERS:
        expected = [float(GENDERS[gender] == name) for gender in best]
        assert scores[name].predictions[0].tolist() == expected
        assert scores[name].items == tuple(identity for identity, *_ in SCHEMAS)
    # Most nurses are women and most plumbers men: their gotcha pronouns are the other ones.
    gotcha = [0 if identity.startswith("nurse") else 1 for identity, *_ in SCHEMAS]
    right = [float(one == other) for one, other in zip(best, gotcha, strict=True)]
    assert scores["accuracy"].predictions[0].tolist() == right


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("all_sentences.tsv", "sentid", "name", r"all_sentences\.tsv, line 1: no column sentid"),
        ("all_sentences.tsv", "nurse.patient.0.male.txt", "x", r"line 2: sentid is 'x'"),
        ("all_sentences.tsv", "0.neutral", "0.female", r"line 4: nurse.patient.0 has no version"),
        ("all_sentences.tsv", "that she was", "that it was", r"line 4: the versions of nurse"),
        ("occupations-stats.tsv", "90.0", "most", r"stats\.tsv, line 2: bls_pct_female is 'most'"),
        ("occupations-stats.tsv", "90.0", "", r"stats\.tsv, line 2: a column is empty"),
    ],
)
def test_faults_name_file_and_line(
    file: str, old: str, new: str, message: str, folder: Path
) -> None:
    path = folder / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        Winogender(folder=str(folder)).check()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"occupations-stats\.tsv: no such file"):
        Winogender(folder=str(tmp_path)).check()
