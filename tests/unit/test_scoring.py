"""Scoring rules against plain transformers: one text and one token at a time, without padding."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from megatron_ettin.evaluation import readings
from megatron_ettin.evaluation.model import open_model
from megatron_ettin.evaluation.readings import LoadedModel, load
from megatron_ettin.evaluation.scoring import (
    Continuation,
    Rule,
    fill_masks,
    log_likelihoods,
    masked_subset,
    refusal,
    resolve,
)
from tests.conftest import TinyCorpus
from tests.models import write_random_model

SHIFTS = {"encoder": 0, "mntp": 1}
MASKED_RULES: list[Rule] = ["pseudo_log_likelihood", "mask_filling", "bound"]
#: (context, continuation); their lengths differ, so that batches are padded.
PAIRS = [
    ("", "ab cd efg hij"),
    ("the one", " two"),
    ("a context that is much longer than any of the others " * 2, " and its end, xyz"),
    ("q", " " + "w e r t y u i o p " * 2),
]


class Direct:
    """The slow reference: a model, asked for one token of one input."""

    def __init__(self, folder: Path, shift: int, is_causal: bool) -> None:
        loader: Any = AutoModelForCausalLM if is_causal else AutoModelForMaskedLM
        self.model = loader.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.shift = shift
        self.cls, self.sep, self.mask = (
            self.tokenizer.convert_tokens_to_ids(token) for token in ("[CLS]", "[SEP]", "[MASK]")
        )

    def logs(self, ids: list[int], place: int) -> torch.Tensor:
        """Return log-probabilities [vocab] of the token at `place`."""
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0, place - self.shift].log_softmax(0)

    def causal(self, context: list[int], tokens: list[int]) -> float:
        ids = [self.cls, *context]
        total = 0.0
        for token in tokens:
            total += float(self.logs(ids, len(ids))[token])
            ids.append(token)
        return total

    def pseudo_log_likelihood(self, context: list[int], tokens: list[int]) -> float:
        return sum(self.masked_loss(context, tokens, (i,)) for i in range(len(tokens)))

    def mask_filling(self, context: list[int], tokens: list[int]) -> float:
        total = 0.0
        for i, token in enumerate(tokens):
            ids = [self.cls, *context, *tokens[:i], self.mask, self.mask, self.mask, self.sep]
            total += float(self.logs(ids, 1 + len(context) + i)[token])
        return total

    def masked_loss(self, context: list[int], tokens: list[int], subset: tuple[int, ...]) -> float:
        """Return the sum of log-probabilities of the tokens of a subset, all of it masked."""
        ids = [self.cls, *context, *tokens, self.sep]
        for i in subset:
            ids[1 + len(context) + i] = self.mask
        return sum(float(self.logs(ids, 1 + len(context) + i)[tokens[i]]) for i in subset)

    def exact_bound(self, context: list[int], tokens: list[int]) -> float:
        length = len(tokens)
        total = 0.0
        for size in range(1, length + 1):
            subsets = list(itertools.combinations(range(length), size))
            losses = [self.masked_loss(context, tokens, subset) for subset in subsets]
            total += length / size * float(np.mean(losses)) / length
        return total


@pytest.fixture(scope="module")
def folders(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    tokenizer = tiny_corpus.folder / "tokenizer"
    made = {
        name: write_random_model(root / name, "encoder", tokenizer, prediction_shift=shift)
        for name, shift in SHIFTS.items()
    }
    return made | {"decoder": write_random_model(root / "decoder", "decoder", tokenizer)}


def opened(folders: dict[str, Path], name: str) -> tuple[LoadedModel, Direct]:
    shift = SHIFTS.get(name, 1)
    return load(open_model(str(folders[name]))), Direct(folders[name], shift, name == "decoder")


def continuations(loaded: LoadedModel) -> list[Continuation]:
    return [
        Continuation(loaded.encode(context), loaded.encode(text), item)
        for item, (context, text) in enumerate(PAIRS)
    ]


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("decoder", "causal"),
        *itertools.product(SHIFTS, ["pseudo_log_likelihood", "mask_filling"]),
    ],
)
def test_rules_equal_the_direct_computation(
    name: str, rule: Rule, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings, "BATCH_TOKENS", 300)
    loaded, direct = opened(folders, name)
    given = continuations(loaded)
    found = [one.log_likelihood for one in log_likelihoods(loaded, given, rule)]
    expected = [getattr(direct, rule)(list(one.context), list(one.tokens)) for one in given]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len({round(value, 3) for value in found}) == len(PAIRS)


@pytest.mark.parametrize("name", SHIFTS)
def test_each_draw_of_the_bound_equals_the_direct_computation(
    name: str, folders: dict[str, Path]
) -> None:
    loaded, direct = opened(folders, name)
    given = continuations(loaded)[:3]
    found = log_likelihoods(loaded, given, "bound", seed=3, num_samples=2)
    for one, score in zip(given, found, strict=True):
        context, tokens = list(one.context), list(one.tokens)
        total = 0.0
        for sample in range(2):
            subset = masked_subset(3, one.item, sample, len(tokens)).tolist()
            total += len(tokens) / len(subset) * direct.masked_loss(context, tokens, tuple(subset))
        assert score.log_likelihood == pytest.approx(total / 2, rel=1e-5)


@pytest.mark.parametrize("length", [1, 4])
def test_the_bound_is_the_mean_over_all_subsets(length: int, folders: dict[str, Path]) -> None:
    loaded, direct = opened(folders, "encoder")
    context, tokens = loaded.encode("the one and"), loaded.encode("q w e r t")[:length]
    assert len(tokens) == length
    num_items, num_samples = 60, 8
    drawn = log_likelihoods(
        loaded,
        [Continuation(context, tokens, item) for item in range(num_items)],
        "bound",
        num_samples=num_samples,
    )
    values = np.array([one.log_likelihood for one in drawn])
    error = values.std(ddof=1) / math.sqrt(num_items)
    exact = direct.exact_bound(context, tokens)
    assert abs(values.mean() - exact) <= 4 * error + 1e-5 * abs(exact)
    assert (error > 1e-3) == (length > 1)


def test_subsets_are_uniform_and_functions_of_their_arguments() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for item in range(3000):
        subset = tuple(masked_subset(0, item, 5, 3).tolist())
        counts[subset] = counts.get(subset, 0) + 1
    # A size has a third; of three subsets with one or two places each has a ninth.
    expected = {
        subset: 3000 / 3 / math.comb(3, size)
        for size in (1, 2, 3)
        for subset in itertools.combinations(range(3), size)
    }
    assert counts.keys() == expected.keys()
    chi_squared = sum((counts[one] - share) ** 2 / share for one, share in expected.items())
    assert chi_squared < 22.5  # 99.9 % of six degrees of freedom
    drawn = [masked_subset(1, 2, sample, 40).tolist() for sample in range(4)]
    assert drawn == [masked_subset(1, 2, sample, 40).tolist() for sample in range(4)]
    others = [masked_subset(*args, 40).tolist() for args in ((0, 2, 0), (1, 3, 0), (1, 2, 1))]
    assert drawn[0] not in others


@pytest.mark.parametrize("name", SHIFTS)
def test_generation_fills_the_first_mask_again_and_again(
    name: str, folders: dict[str, Path]
) -> None:
    loaded, direct = opened(folders, name)
    contexts = [loaded.encode("the one and"), loaded.encode("q w e r t y u i o p"), []]
    found = fill_masks(
        loaded, contexts, max_new_tokens=6, is_finished=lambda ids: len(ids) == 4 or 7 in ids
    )
    banned = direct.tokenizer.all_special_ids
    for context, tokens in zip(contexts, found, strict=True):
        expected: list[int] = []
        while len(expected) < 4 and 7 not in expected:
            ids = [direct.cls, *context, *expected, *3 * [direct.mask], direct.sep]
            logs = direct.logs(ids, 1 + len(context) + len(expected))
            logs[banned] = -torch.inf
            expected.append(int(logs.argmax()))
        assert tokens == expected
    # What the model itself says is greedy, and another token is not.
    chosen = [
        Continuation(context, tokens) for context, tokens in zip(contexts, found, strict=True)
    ]
    other = [one._replace(tokens=[*one.tokens[:-1], one.tokens[-1] ^ 1]) for one in chosen]
    scores = log_likelihoods(loaded, [*chosen, *other], "mask_filling")
    assert [one.is_greedy for one in scores] == [True] * 3 + [False] * 3


def test_long_contexts_are_cut_from_the_left_and_counted(folders: dict[str, Path]) -> None:
    loaded, direct = opened(folders, "encoder")
    context, tokens = loaded.encode("ab cd ef gh " * 40), loaded.encode(" xyz")
    (found,) = log_likelihoods(loaded, [Continuation(context, tokens)], "mask_filling")
    room = 128 - len(tokens) - 4
    assert found.num_cut_tokens == len(context) - room
    expected = direct.mask_filling(context[-room:], tokens)
    assert found.log_likelihood == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rule", MASKED_RULES)
def test_what_cannot_be_scored_is_refused(rule: Rule, folders: dict[str, Path]) -> None:
    loaded, _ = opened(folders, "encoder")
    with pytest.raises(ValueError, match="no tokens"):
        log_likelihoods(loaded, [Continuation([5], [])], rule)
    with pytest.raises(ValueError, match="200 tokens is too long; the model has room for 12"):
        log_likelihoods(loaded, [Continuation([], 200 * [5])], rule)
    with pytest.raises(ValueError, match="leaves no room"):
        fill_masks(loaded, [[5]], max_new_tokens=124, is_finished=lambda _: False)


def test_models_take_the_rules_of_their_kind(folders: dict[str, Path]) -> None:
    encoder, decoder = (open_model(str(folders[name])) for name in ("encoder", "decoder"))
    assert resolve("auto", decoder, masked="mask_filling") == "causal"
    assert resolve("auto", encoder, masked="mask_filling") == "mask_filling"
    assert resolve("bound", encoder, masked="mask_filling") == "bound"
    assert refusal("auto", encoder) is refusal("auto", decoder) is None
    assert refusal("causal", decoder) is None
    assert "reads both sides" in str(refusal("causal", encoder))
    for rule in MASKED_RULES:
        assert refusal(rule, encoder) is None
        assert f"the rule {rule} needs a model that fills masks" in str(refusal(rule, decoder))
