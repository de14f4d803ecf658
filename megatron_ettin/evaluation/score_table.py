"""Tables of measured scores, for a console."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from megatron_ettin.evaluation.results import Result
from megatron_ettin.evaluation.scores import Score, over_seeds
from megatron_ettin.text_table import text_table

HEADINGS = ("task", "model", "metric", "n", "value", "95 % over items", "95 % over seeds", "chance")


def joined(results: Sequence[Result]) -> dict[tuple[str, str], Score]:
    """Return the first score of each (task, model), with its seeds joined, in the order given."""
    by_place: dict[tuple[str, str], list[Score]] = {}
    for result in results:
        score = next(iter(result.scores.values()))
        by_place.setdefault((result.task, result.model), []).append(score)
    return {place: over_seeds(scores) for place, scores in by_place.items()}


def score_table(results: Sequence[Result]) -> Iterator[str]:
    """Yield lines: a score a line, with the difference to the first model in the same task.

    A difference is marked with * where its 95 % interval (paired bootstrap over items) excludes
    zero.
    """
    scores = joined(results)
    rows = []
    for task, places in groupby(scores, lambda place: place[0]):
        names = [model for _, model in places]
        first = scores[task, names[0]]
        for model in names:
            score = scores[task, model]
            rows.append((task, model, *_numbers(score), _difference(score, first)))
    numbers = ("n", "value", "chance", "minus first model")
    return text_table((*HEADINGS, "minus first model"), rows, numbers=numbers)


def _numbers(score: Score) -> tuple[str, ...]:
    seeds, chance = score.seed_interval, score.chance
    return (
        score.metric,
        str(len(score.items)),
        f"{score.value:.4f}",
        "{:.4f} to {:.4f}".format(*score.interval),
        "" if seeds is None else "{:.4f} to {:.4f}".format(*seeds),
        "" if chance is None else f"{chance:.4f}",
    )


def _difference(score: Score, first: Score) -> str:
    if score is first:
        return ""
    difference = score.minus(first)
    mark = " *" if difference.interval.excludes_zero else ""
    return f"{difference.value:+.4f}{mark}"
