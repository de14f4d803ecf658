"""Gender bias: the pronoun that a model prefers in Winogender schemas (Rudinger et al. 2018)."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.evaluation.model import Model
from megatron_ettin.evaluation.readings import LoadedModel, Reading, load, predict
from megatron_ettin.evaluation.scores import Score
from megatron_ettin.evaluation.scoring import (
    Continuation,
    estimated_tokens,
    forward_tokens,
    log_likelihoods,
)
from megatron_ettin.evaluation.tasks.task import Family, Task, TaskScores, TaskWork

SENTENCES = "all_sentences.tsv"
OCCUPATIONS = "occupations-stats.tsv"
GENDERS = ("male", "female", "neutral")
#: Pronouns of a case, in the order of GENDERS.
PRONOUNS = (("he", "she", "they"), ("his", "her", "their"), ("him", "her", "them"))


class Schema(NamedTuple):
    """A sentence in three versions, which differ in the pronoun's gender."""

    identity: str
    """Occupation, participant and number of the answer."""
    versions: tuple[str, str, str]
    """Sentences, in the order of GENDERS."""
    num_words_before: int
    """Words before the pronoun."""
    gotcha: int
    """Gender, as a place in GENDERS, that most people of the occupation do not have."""

    @property
    def agrees(self) -> bool:
        """Tell whether the versions differ in a verb too: "he was", "they were"."""
        words = [version.split() for version in self.versions]
        return words[0][self.num_words_before + 1 :] != words[2][self.num_words_before + 1 :]


@dataclass(frozen=True, kw_only=True)
class Winogender(Task):
    """Shares of the three genders among the pronouns that a model prefers, in 240 sentences.

    The sentences are the "gotcha" ones: each schema with the pronoun that does not match the
    majority of its occupation. An encoder gets them with the pronoun masked, and prefers the most
    probable of the three pronouns. A decoder prefers the version with the lowest perplexity. This
    is the Ettin paper's protocol (arXiv 2507.11412).
    """

    family: ClassVar[Family] = "bias"

    folder: str
    """Folder with all_sentences.tsv and occupations-stats.tsv of
    github.com/rudinger/winogender-schemas, data/."""

    def files(self) -> list[Path]:
        """Return the two files."""
        return [Path(self.folder) / name for name in (SENTENCES, OCCUPATIONS)]

    def check(self) -> None:
        """Read all sentences."""
        self._schemas()

    def work(self, model: Model) -> TaskWork:
        """Count the tokens of three versions of each sentence."""
        lengths = [estimated_tokens(text) for one in self._schemas() for text in one.versions]
        return TaskWork(forward_tokens=sum(forward_tokens("causal", 0, n) for n in lengths))

    def measure(self, model: Model, *, seed: int, scratch: Path) -> TaskScores:
        """Find the preferred pronoun of each schema."""
        schemas = self._schemas()
        loaded = load(model)
        rule = causal_preferences if model.attention == "causal" else masked_preferences
        values = rule(loaded, schemas)
        is_best = values == values.max(axis=1, keepdims=True)
        shares = is_best / is_best.sum(axis=1, keepdims=True)
        gotcha = shares[range(len(schemas)), [one.gotcha for one in schemas]]
        by_name = {
            "neutral": shares[:, 2],
            "male": shares[:, 0],
            "female": shares[:, 1],
            "accuracy": gotcha,
        }
        items = tuple(one.identity for one in schemas)
        scores = {
            name: Score(
                metric="accuracy" if name == "accuracy" else f"share of {name} pronouns",
                items=items,
                predictions=share[None, :],
                chance=1 / 3,
            )
            for name, share in by_name.items()
        }
        agreeing = np.array([one.agrees for one in schemas])
        notes = {
            "ties": int((is_best.sum(axis=1) > 1).sum()),
            "schemas whose verb agrees": int(agreeing.sum()),
            "neutral share of the other schemas": float(shares[~agreeing, 2].mean()),
            "longest pronoun in tokens": max(
                len(_span(loaded, one, gender)[1]) for one in schemas for gender in range(3)
            ),
        }
        return TaskScores(scores=scores, notes=notes)

    def _schemas(self) -> list[Schema]:
        sentences, occupations = self.files()
        gotcha = dict(_gotcha_genders(occupations))
        versions: dict[str, dict[str, str]] = {}
        places: dict[str, str] = {}
        for number, (name, sentence) in _rows(sentences, ("sentid", "sentence")):
            place = f"{sentences}, line {number}"
            parts = name.removesuffix(".txt").split(".")
            if len(parts) != 4 or parts[3] not in GENDERS or parts[0] not in gotcha:
                raise ValueError(
                    f"{place}: sentid is {name!r}; expected OCCUPATION.PARTICIPANT.ANSWER.GENDER "
                    f"with an occupation of {OCCUPATIONS} and a gender of {', '.join(GENDERS)}"
                )
            identity = ".".join(parts[:3])
            versions.setdefault(identity, {})[parts[3]] = sentence
            places[identity] = place
        if not versions:
            raise ValueError(f"{sentences}: no sentences")
        return [
            _schema(identity, found, gotcha[identity.partition(".")[0]], places[identity])
            for identity, found in versions.items()
        ]


def _gotcha_genders(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each occupation with the gender that its majority does not have.

    The majority is that of the U.S. Bureau of Labor Statistics, as in Rudinger et al. 2018.
    """
    for number, (occupation, percent) in _rows(path, ("occupation", "bls_pct_female")):
        try:
            share = float(percent)
        except ValueError:
            raise ValueError(
                f"{path}, line {number}: bls_pct_female is {percent!r}; expected a number"
            ) from None
        yield occupation, GENDERS.index("male" if share > 50.0 else "female")


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, values of the columns) of a file with tabs between its columns."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; docs/evaluation.md says how to get Winogender")
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t")
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path}, line 1: no column {', '.join(missing)}")
        for row in reader:
            values = [row[name] for name in columns]
            if not all(values):
                raise ValueError(f"{path}, line {reader.line_num}: a column is empty")
            yield reader.line_num, values


def _schema(identity: str, found: dict[str, str], gotcha: int, place: str) -> Schema:
    if missing := [gender for gender in GENDERS if gender not in found]:
        raise ValueError(f"{place}: {identity} has no version that is {', '.join(missing)}")
    male, female, neutral = (found[gender] for gender in GENDERS)
    words = zip(male.split(), female.split(), neutral.split(), strict=False)
    differing = next(((i, trio) for i, trio in enumerate(words) if len(set(trio)) > 1), None)
    if differing is None or differing[1] not in PRONOUNS:
        raise ValueError(
            f"{place}: the versions of {identity} do not differ first in a pronoun such as "
            f"{'/'.join(PRONOUNS[0])}"
        )
    return Schema(identity, (male, female, neutral), differing[0], gotcha)


def causal_preferences(loaded: LoadedModel, schemas: Sequence[Schema]) -> NDArray[np.float64]:
    """Return minus the logarithm of each version's perplexity, [schemas, 3]."""
    texts = [
        Continuation([], loaded.encode(text)) for schema in schemas for text in schema.versions
    ]
    found = log_likelihoods(loaded, texts, "causal")
    means = [one.log_likelihood / len(text.tokens) for one, text in zip(found, texts, strict=True)]
    return np.array(means).reshape(-1, 3)


def masked_preferences(loaded: LoadedModel, schemas: Sequence[Schema]) -> NDArray[np.float64]:
    """Return the log-probability of each pronoun in the gotcha sentence, [schemas, 3].

    A pronoun of k tokens is read from k masks, which are filled from the left: the sum over j of
    log p(t_j | t_<j, k - j + 1 masks, the rest). With k = 1 for all three, the best one is the
    arg-max over pronouns of the usual single mask.
    """
    values = np.zeros((len(schemas), 3))
    readings = (
        reading
        for row, schema in enumerate(schemas)
        for gender in range(3)
        for reading in _pronoun_readings(loaded, schema, gender, owner=3 * row + gender)
    )
    for reading, prediction in predict(loaded, readings):
        values.flat[reading.owner] += prediction.log_probability
    return values


def _pronoun_readings(
    loaded: LoadedModel, schema: Schema, gender: int, *, owner: int
) -> Iterator[Reading]:
    before, _, after = _span(loaded, schema, schema.gotcha)
    _, pronoun, _ = _span(loaded, schema, gender)
    for number, token in enumerate(pronoun):
        masks = (len(pronoun) - number) * [loaded.mask_id]
        ids = [*before, *pronoun[:number], *masks, *after]
        yield Reading(
            owner=owner,
            input_ids=[loaded.start_id, *ids, loaded.end_id],
            positions=[1 + len(before) + number],
            tokens=[token],
        )


def _span(
    loaded: LoadedModel, schema: Schema, gender: int
) -> tuple[list[int], list[int], list[int]]:
    """Return the token ids before, of and after the pronoun of a version."""
    text = schema.versions[gender]
    words = text.split()
    before = loaded.encode(" ".join(words[: schema.num_words_before]))
    through = loaded.encode(" ".join(words[: schema.num_words_before + 1]))
    ids = loaded.encode(" ".join(words))
    if through[: len(before)] != before or ids[: len(through)] != through:
        raise ValueError(
            f"{loaded.model.folder}: the tokenizer joins a pronoun with its neighbours in {text!r}"
        )
    return before, through[len(before) :], ids[len(through) :]
