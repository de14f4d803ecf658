"""Scoring rules: how a language model of each kind gives a text its log-likelihood.

A rule turns a continuation into readings of the model; the weighted sum of their log-probabilities
is the score. All rules read `[CLS] context continuation`, and those of masked language models end
the input with `[SEP]`. Special tokens are never scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_ettin.evaluation.model import Model
from megatron_ettin.evaluation.readings import (
    LoadedModel,
    Reading,
    logits_at,
    most_probable,
    predict,
)

Rule = Literal["causal", "pseudo_log_likelihood", "mask_filling", "bound"]
#: Rule of a task, where "auto" leaves the choice to the model's kind and the task.
RuleChoice = Literal["auto", "causal", "pseudo_log_likelihood", "mask_filling", "bound"]

#: [MASK] tokens after a prefix: the model sees that the text goes on, and only the first counts.
NUM_APPENDED_MASKS = 3
#: Masks drawn for a bound, as many as LLaDA's public evaluation draws (`mc_num`).
NUM_BOUND_SAMPLES = 128


class Continuation(NamedTuple):
    """Tokens to be scored after a context; the context of a whole text is empty."""

    context: Sequence[int]
    tokens: Sequence[int]
    """Token ids; neither these nor the context hold the special tokens of the input's frame."""
    item: int = 0
    """Number that the masks of `bound` are drawn from; equal items of a comparison share masks."""


class Likelihood(NamedTuple):
    """Score of a continuation."""

    log_likelihood: float
    is_greedy: bool
    """Flag that the model itself would have chosen each token."""
    num_cut_tokens: int
    """Tokens cut from the context's left, where the input was too long for the model."""


def refusal(rule: RuleChoice, model: Model) -> str | None:
    """Return why a model cannot be scored by a rule, or None."""
    if rule == "auto" or (rule == "causal") == (model.attention == "causal"):
        return None
    if rule == "causal":
        return "the rule causal needs a model that reads from the left; this one reads both sides"
    return f"the rule {rule} needs a model that fills masks; this one predicts the next token"


def resolve(rule: RuleChoice, model: Model, *, masked: Rule) -> Rule:
    """Return the rule itself; for "auto", causal or, for models that fill masks, `masked`."""
    if rule != "auto":
        return rule
    return "causal" if model.attention == "causal" else masked


def log_likelihoods(
    loaded: LoadedModel,
    continuations: Sequence[Continuation],
    rule: Rule,
    *,
    seed: int = 0,
    num_samples: int = NUM_BOUND_SAMPLES,
) -> list[Likelihood]:
    """Score continuations by a rule; `seed` and `num_samples` are of the bound alone.

    Raises:
        ValueError: a continuation is empty, or too long for the model even without a context.
    """
    readings_of, num_frame_tokens = RULES[rule]
    if rule == "bound":
        readings_of = partial(bound, seed=seed, num_samples=num_samples)
    room = loaded.model.max_tokens - num_frame_tokens
    kept = [_cut_to(room, continuation, loaded.model) for continuation in continuations]
    # The longest come first: batches of equal lengths, and memory that runs out does so at once.
    order = sorted(range(len(kept)), key=lambda i: -len(kept[i].context) - len(kept[i].tokens))
    scores = np.zeros(len(kept))
    is_greedy = np.ones(len(kept), dtype=bool)
    bar = tqdm(order, desc=f"{loaded.model.name}: {rule}", leave=False, disable=None)
    readings = (reading for i in bar for reading in readings_of(loaded, kept[i], i))
    for reading, prediction in predict(loaded, readings):
        scores[reading.owner] += reading.weight * prediction.log_probability
        if reading.decides_greedy:
            is_greedy[reading.owner] &= prediction.is_greedy
    return [
        Likelihood(float(score), bool(greedy), len(given.context) - len(cut.context))
        for score, greedy, given, cut in zip(scores, is_greedy, continuations, kept, strict=True)
    ]


def _cut_to(room: int, continuation: Continuation, model: Model) -> Continuation:
    num_tokens = len(continuation.tokens)
    if not num_tokens:
        raise ValueError("nothing to score: a text or continuation has no tokens")
    if num_tokens > room:
        raise ValueError(
            f"{model.name}: a continuation of {num_tokens} tokens is too long; the model has room "
            f"for {room}"
        )
    first = max(0, len(continuation.context) - (room - num_tokens))
    return continuation._replace(context=continuation.context[first:])


def causal(loaded: LoadedModel, continuation: Continuation, owner: int) -> Iterator[Reading]:
    """Read a continuation from the left: sum over i of log p(x_i | [CLS] context x_<i).

    This is lm-eval's log-likelihood with `add_bos_token=True` (`HFLM._loglikelihood_tokens`).
    """
    ids = [loaded.start_id, *continuation.context, *continuation.tokens]
    first = len(ids) - len(continuation.tokens)
    yield Reading(
        owner=owner,
        input_ids=ids[:-1],
        positions=range(first, len(ids)),
        tokens=continuation.tokens,
    )


def pseudo_log_likelihood(
    loaded: LoadedModel, continuation: Continuation, owner: int
) -> Iterator[Reading]:
    """Mask each token in turn: sum over i of log p(x_i | everything but x_i).

    Salazar et al. 2020 (arXiv 1910.14659), section 2.
    """
    first = 1 + len(continuation.context)
    ids = _framed(loaded, [*continuation.context, *continuation.tokens])
    for place, token in enumerate(continuation.tokens, start=first):
        masked = [*ids[:place], loaded.mask_id, *ids[place + 1 :]]
        yield Reading(owner=owner, input_ids=masked, positions=[place], tokens=[token])


def mask_filling(loaded: LoadedModel, continuation: Continuation, owner: int) -> Iterator[Reading]:
    """Fill the first of three masks: sum over i of log p(x_i | context x_<i, nothing after it).

    Each token is read at the first mask of `[CLS] context x_<i [MASK] [MASK] [MASK] [SEP]`: Samuel
    2024, "BERTs are generative in-context learners" (arXiv 2406.04823), as the Ettin paper (arXiv
    2507.11412) uses encoders.
    """
    for number, token in enumerate(continuation.tokens):
        prefix = [*continuation.context, *continuation.tokens[:number]]
        yield Reading(
            owner=owner,
            input_ids=_with_masks(loaded, prefix),
            positions=[1 + len(prefix)],
            tokens=[token],
        )


def bound(
    loaded: LoadedModel,
    continuation: Continuation,
    owner: int,
    *,
    seed: int,
    num_samples: int,
) -> Iterator[Reading]:
    """Estimate the lower bound of a masked diffusion model on a log-likelihood.

    log p(x) >= E over l uniform in {1..L} and over subsets M of l of the L tokens, of L / l times
    the sum over i in M of log p(x_i | context, tokens outside M): LLaDA (arXiv 2502.09992),
    section 2.4. The estimate is the mean over `num_samples` draws.

    A continuation is greedy if each of its tokens is the best one where all of them are masked.
    """
    first = 1 + len(continuation.context)
    ids = np.array(_framed(loaded, [*continuation.context, *continuation.tokens]))
    length = len(continuation.tokens)
    everything = np.arange(length)
    draws = [(everything, 0.0)]
    for sample in range(num_samples):
        subset = masked_subset(seed, continuation.item, sample, length)
        draws.append((subset, length / len(subset) / num_samples))
    for subset, weight in draws:
        masked = ids.copy()
        masked[first + subset] = loaded.mask_id
        yield Reading(
            owner=owner,
            input_ids=masked.tolist(),
            positions=(first + subset).tolist(),
            tokens=ids[first + subset].tolist(),
            weight=weight,
            decides_greedy=weight == 0.0,
        )


def masked_subset(seed: int, item: int, sample: int, length: int) -> NDArray[np.int64]:
    """Return l of the places 0 to length - 1, sorted: l is uniform, and each subset of l as likely.

    A function of the arguments alone: numpy's Philox with key (seed, item) and counter
    (0, 0, 0, sample). The first word gives l, and the l smallest of the next ones the subset.
    """
    philox = np.random.Philox(
        key=np.array([seed, item], dtype=np.uint64),
        counter=np.array([0, 0, 0, sample], dtype=np.uint64),
    )
    words = philox.random_raw(1 + length)
    size = 1 + int(words[0] % np.uint64(length))
    return np.sort(np.argsort(words[1:])[:size])


#: Function of each rule, and the tokens that it adds to context and continuation.
RULES: dict[Rule, tuple[Callable[..., Iterator[Reading]], int]] = {
    "causal": (causal, 0),  # [CLS] is added, and the last token is not read
    "pseudo_log_likelihood": (pseudo_log_likelihood, 2),
    "mask_filling": (mask_filling, 1 + NUM_APPENDED_MASKS),  # likewise, with [SEP]
    "bound": (bound, 2),
}


def forward_tokens(
    rule: Rule, context: int, tokens: int, num_samples: int = NUM_BOUND_SAMPLES
) -> int:
    """Return the tokens that a model reads to score `tokens` tokens after `context` tokens."""
    whole = context + tokens + RULES[rule][1]
    readings = {
        "causal": whole,
        "pseudo_log_likelihood": tokens * whole,
        "mask_filling": tokens * (whole - tokens // 2),
        "bound": (1 + num_samples) * whole,
    }
    return readings[rule]


def estimated_tokens(text: str) -> int:
    """Return about how many tokens a text has: one for four characters."""
    return 1 + len(text) // 4


def fill_masks(
    loaded: LoadedModel,
    contexts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    is_finished: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Generate greedily by the rule `mask_filling`, special tokens banned.

    A text ends when `is_finished` says so of its new tokens, or after `max_new_tokens`. Contexts
    are cut from the left to leave room for as many.
    """
    room = loaded.model.max_tokens - RULES["mask_filling"][1] - max_new_tokens
    if room < 1:
        raise ValueError(
            f"{loaded.model.name}: max_tokens {loaded.model.max_tokens} leaves no room for a "
            f"context before {max_new_tokens} new tokens"
        )
    texts: list[list[int]] = [[] for _ in contexts]
    unfinished = list(range(len(contexts)))
    for _ in range(max_new_tokens):
        if not unfinished:
            break
        prefixes = [[*contexts[i][-room:], *texts[i]] for i in unfinished]
        inputs = [_with_masks(loaded, prefix) for prefix in prefixes]
        places = [(row, 1 + len(prefix)) for row, prefix in enumerate(prefixes)]
        best = most_probable(loaded, logits_at(loaded, inputs, places)).tolist()
        for i, token in zip(unfinished, best, strict=True):
            texts[i].append(token)
        unfinished = [i for i in unfinished if not is_finished(texts[i])]
    return texts


def _framed(loaded: LoadedModel, ids: Sequence[int]) -> list[int]:
    return [loaded.start_id, *ids, loaded.end_id]


def _with_masks(loaded: LoadedModel, prefix: Sequence[int]) -> list[int]:
    return _framed(loaded, [*prefix, *NUM_APPENDED_MASKS * [loaded.mask_id]])
