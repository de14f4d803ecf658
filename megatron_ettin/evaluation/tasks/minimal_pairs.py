"""Minimal pairs: which of two sentences a model finds more likely (BLiMP, Warstadt et al. 2020)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from megatron_ettin.data.json_lines import JsonLine, read_json_lines
from megatron_ettin.evaluation.model import Model
from megatron_ettin.evaluation.readings import load
from megatron_ettin.evaluation.scores import Score
from megatron_ettin.evaluation.scoring import (
    NUM_BOUND_SAMPLES,
    Continuation,
    RuleChoice,
    estimated_tokens,
    forward_tokens,
    log_likelihoods,
    refusal,
    resolve,
)
from megatron_ettin.evaluation.tasks.task import Family, Task, TaskScores, TaskWork


class Pair(NamedTuple):
    """An acceptable sentence and an unacceptable one that differ as little as can be."""

    identity: str
    """Name of the file and number of the line."""
    good: str
    bad: str
    phenomenon: str


@dataclass(frozen=True, kw_only=True)
class MinimalPairs(Task):
    """Share of pairs whose acceptable sentence is the more likely one, by log-likelihood.

    Sentences of a pair are scored whole, by the same rule. A tie counts a half.
    """

    family: ClassVar[Family] = "minimal pairs"

    folder: str
    """Folder of .jsonl files in the form of BLiMP: a pair a line, with the fields `sentence_good`
    and `sentence_bad`; scores by phenomenon go by `linguistics_term`, or else by file."""
    pairs_per_file: int | None = None
    """First pairs of each file that are measured; null for all."""
    rule: RuleChoice = "auto"
    """Scoring rule; auto is causal for decoders and pseudo_log_likelihood for models that fill
    masks."""
    bound_samples: int = NUM_BOUND_SAMPLES
    """Masks drawn for a sentence by the rule `bound`; a pair shares them."""

    def files(self) -> list[Path]:
        """Return the .jsonl files of the folder."""
        return sorted(Path(self.folder).glob("*.jsonl"))

    def check(self) -> None:
        """Read all pairs that will be measured."""
        self._pairs()

    def refusal(self, model: Model) -> str | None:
        """Return why the rule does not suit the model, or None."""
        return refusal(self.rule, model)

    def work(self, model: Model) -> TaskWork:
        """Count the tokens of the forward passes."""
        rule = resolve(self.rule, model, masked="pseudo_log_likelihood")
        lengths = [estimated_tokens(text) for pair in self._pairs() for text in pair[1:3]]
        tokens = sum(forward_tokens(rule, 0, length, self.bound_samples) for length in lengths)
        return TaskWork(forward_tokens=tokens)

    def measure(self, model: Model, *, seed: int, scratch: Path) -> TaskScores:
        """Score both sentences of each pair; the bound alone depends on the seed."""
        pairs = self._pairs()
        loaded = load(model)
        rule = resolve(self.rule, model, masked="pseudo_log_likelihood")
        texts = [
            Continuation([], loaded.encode(text), zlib.crc32(pair.identity.encode()))
            for pair in pairs
            for text in (pair.good, pair.bad)
        ]
        found = log_likelihoods(loaded, texts, rule, seed=seed, num_samples=self.bound_samples)
        values = np.array([one.log_likelihood for one in found]).reshape(-1, 2)
        right = 0.5 + 0.5 * np.sign(values[:, 0] - values[:, 1])
        scores = {"accuracy": _score(pairs, right)}
        for phenomenon in sorted({pair.phenomenon for pair in pairs}):
            chosen = [i for i, pair in enumerate(pairs) if pair.phenomenon == phenomenon]
            scores[phenomenon] = _score([pairs[i] for i in chosen], right[chosen])
        return TaskScores(
            scores=scores, notes={"rule": rule, "ties": int(np.count_nonzero(right == 0.5))}
        )

    def _pairs(self) -> list[Pair]:
        files = self.files()
        if not files:
            raise ValueError(
                f"{self.folder}: no .jsonl files; docs/evaluation.md says how to get BLiMP"
            )
        pairs = [pair for path in files for pair in islice(_read(path), self.pairs_per_file)]
        if not pairs:
            raise ValueError(f"{self.folder}: no pairs in its {len(files)} .jsonl files")
        return pairs


def _score(pairs: list[Pair], right: np.ndarray) -> Score:
    return Score(
        metric="accuracy",
        items=tuple(pair.identity for pair in pairs),
        predictions=right[None, :],
        chance=0.5,
    )


def _read(path: Path) -> Iterator[Pair]:
    for number, line in enumerate(read_json_lines(path), start=1):
        good, bad = (_sentence(line, name) for name in ("sentence_good", "sentence_bad"))
        phenomenon = str(line.fields.get("linguistics_term") or path.stem)
        yield Pair(f"{path.stem}:{number}", good, bad, phenomenon)


def _sentence(line: JsonLine, name: str) -> str:
    sentence = line.text(name)
    if not sentence.strip():
        raise ValueError(f"{line.where}: {name} is {sentence!r}; expected a sentence")
    return sentence
