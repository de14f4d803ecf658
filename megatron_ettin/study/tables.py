"""The numbers of a study as rows: for the page, for results.csv and for results.md."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

from megatron_ettin.evaluation.scores import ConfidenceInterval
from megatron_ettin.study.comparison import Contrast, Number, Quantity, StudyComparison
from megatron_ettin.study.history import STANDARD_ERRORS, History

INTERVALS = (
    "The interval over items says how much a number would move with other test items of the same "
    "kind: 95 %, by bootstrap (of a difference: by paired bootstrap on the same items).",
    "The between-seed interval says how much it would move with other seeds: 95 %, Student's t. "
    "The seeds are those of training where the study trains several, otherwise those of the "
    "evaluation. Two or three seeds give a wide one.",
    "A difference counts as beyond its interval if neither of them holds zero. A number is bold if "
    "it is above that of every other arm, each time beyond the interval.",
)

NUMBER_COLUMNS = (
    "size", "family", "task", "score", "metric", "arm", "n", "value", "standard_error",
    "low", "high", "seed_kind", "seeds", "seed_low", "seed_high", "chance",
)  # fmt: skip
CONTRAST_COLUMNS = (
    "size", "family", "task", "score", "difference", "value", "low", "high",
    "seed_low", "seed_high", "beyond_its_interval",
)  # fmt: skip
HELD_OUT_COLUMNS = (
    "size", "arm", "seed", "last objective", "measures", "held-out loss", "95 %, rows", "tokens",
)  # fmt: skip
COST_COLUMNS = ("size", "arm", "seed", "tokens", "tokens with start", "hours", "PFLOP")


def show(value: float) -> str:
    """Return a score in three decimals."""
    return f"{value:.3f}"


def show_difference(value: float) -> str:
    """Return a difference with its sign."""
    return f"{value:+.3f}"


def show_interval(interval: ConfidenceInterval | None) -> str:
    """Return an interval in brackets; nothing for none."""
    return "" if interval is None else f"[{interval.low:.3f}, {interval.high:.3f}]"


def number_rows(numbers: Iterable[Number]) -> list[dict[str, object]]:
    """Return a row of NUMBER_COLUMNS for each number, unrounded."""
    rows = []
    for number in numbers:
        score, seeds = number.score, number.seed_interval
        rows.append(
            {
                **_place(number.quantity),
                "metric": score.metric,
                "arm": number.arm,
                "n": len(score.items),
                "value": score.value,
                "standard_error": score.standard_error,
                **dict(zip(("low", "high"), score.interval, strict=True)),
                "seed_kind": number.seed_kind,
                "seeds": len(number.by_seed),
                **dict(zip(("seed_low", "seed_high"), seeds or (None, None), strict=True)),
                "chance": score.chance,
            }
        )
    return rows


def contrast_rows(contrasts: Iterable[Contrast]) -> list[dict[str, object]]:
    """Return a row of CONTRAST_COLUMNS for each difference, unrounded."""
    return [
        {
            **_place(contrast.quantity),
            "difference": f"{contrast.first} - {contrast.second}",
            "value": contrast.value,
            **dict(zip(("low", "high"), contrast.interval, strict=True)),
            **dict(
                zip(("seed_low", "seed_high"), contrast.seed_interval or (None, None), strict=True)
            ),
            "beyond_its_interval": "yes" if contrast.is_beyond else "no",
        }
        for contrast in contrasts
    ]


def cost_rows(histories: Sequence[History]) -> list[tuple[str, ...]]:
    """Return a row of COST_COLUMNS for each run."""
    return [
        (
            history.model.size,
            history.model.arm,
            str(history.model.seed),
            f"{history.tokens:,}",
            f"{history.start_tokens + history.tokens:,}",
            f"{history.hours:.2f}",
            f"{history.flops / 1e15:,.3g}",
        )
        for history in histories
    ]


def held_out_rows(histories: Sequence[History]) -> list[tuple[str, ...]]:
    """Return a row of HELD_OUT_COLUMNS for the last held-out loss of each run."""
    rows: list[tuple[str, ...]] = []
    for history in histories:
        if (found := history.held_out) is None:
            continue
        half = STANDARD_ERRORS * found.standard_error
        interval = ConfidenceInterval(found.loss - half, found.loss + half)
        rows.append(
            (
                history.model.size,
                history.model.arm,
                str(history.model.seed),
                type(history.objective).__name__,
                history.loss_kind,
                show(found.loss),
                show_interval(interval),
                f"{found.scored_tokens:,}",
            )
        )
    return rows


def _place(quantity: Quantity) -> dict[str, object]:
    return {
        "size": quantity.size,
        "family": quantity.family,
        "task": quantity.task,
        "score": quantity.score,
    }


def findings(comparison: StudyComparison) -> list[tuple[str, list[str]]]:
    """Return what the first score of each task says: a heading, then sentences."""
    contrasts: dict[Quantity, list[Contrast]] = {}
    for contrast in comparison.contrasts:
        contrasts.setdefault(contrast.quantity, []).append(contrast)
    return [
        (_heading(comparison, quantity), _sentences(numbers, contrasts.get(quantity, [])))
        for quantity, numbers in comparison.by_quantity.items()
        if quantity.is_first
    ]


def _heading(comparison: StudyComparison, quantity: Quantity) -> str:
    metric = next(iter(comparison.by_quantity[quantity].values())).score.metric
    size = f"{quantity.size}, " if len(comparison.sizes) > 1 else ""
    return f"{size}{quantity.task} ({metric})"


def _sentences(numbers: Mapping[str, Number], contrasts: Sequence[Contrast]) -> list[str]:
    sentences = [_ahead(contrast) for contrast in contrasts if contrast.is_beyond]
    alike = [f"{c.first} and {c.second}" for c in contrasts if not c.is_beyond]
    if contrasts and not sentences:
        sentences.append("no difference beyond its interval")
    elif alike:
        sentences.append("no difference beyond its interval: " + "; ".join(alike))
    if at_chance := [arm for arm, number in numbers.items() if number.is_at_chance]:
        sentences.append("interval holds the chance: " + ", ".join(at_chance))
    return sentences


def _ahead(contrast: Contrast) -> str:
    # A share of a bias task is no merit, so a higher one is not called ahead.
    relation = "is higher than" if contrast.quantity.family == "bias" else "is ahead of"
    first, second, sign = contrast.first, contrast.second, 1.0
    low, high = contrast.interval
    if contrast.value < 0:
        first, second, sign, low, high = second, first, -1.0, -high, -low
    return (
        f"{first} {relation} {second}: {show_difference(sign * contrast.value)} "
        f"{show_interval(ConfidenceInterval(low, high))}"
    )


def multiplicity(comparison: StudyComparison) -> str:
    """Return the warning that many comparisons are made."""
    count = len(comparison.contrasts)
    beyond = sum(contrast.is_beyond for contrast in comparison.contrasts)
    return (
        f"{count} differences are compared with intervals of 95 %, each on its own: if no two arms "
        f"differed, about {count / 20:.0f} of them would still be beyond their intervals over "
        f"items. {beyond} are beyond."
    )


def as_csv(comparison: StudyComparison) -> str:
    """Return numbers and differences as one CSV: an empty column does not apply to the row."""
    output = io.StringIO()
    columns = list(dict.fromkeys(("kind", *NUMBER_COLUMNS, *CONTRAST_COLUMNS)))
    writer = csv.DictWriter(output, columns, lineterminator="\n")
    writer.writeheader()
    for row in number_rows(comparison.numbers):
        writer.writerow({"kind": "number", **row})
    for row in contrast_rows(comparison.contrasts):
        writer.writerow({"kind": "difference", **row})
    return output.getvalue()


def as_markdown(comparison: StudyComparison) -> str:
    """Return numbers and differences as two tables of Markdown, with the notes on intervals."""
    numbers = [
        [_cell(row[name]) for name in NUMBER_COLUMNS] for row in number_rows(comparison.numbers)
    ]
    bold = NUMBER_COLUMNS.index("value")
    for row, number in zip(numbers, comparison.numbers, strict=True):
        if (number.quantity, number.arm) in comparison.highest:
            row[bold] = f"**{row[bold]}**"
    contrasts = [
        [_cell(row[name]) for name in CONTRAST_COLUMNS]
        for row in contrast_rows(comparison.contrasts)
    ]
    return "\n".join(
        [
            "# Numbers",
            "",
            *_markdown_table(NUMBER_COLUMNS, numbers),
            "",
            "# Differences",
            "",
            *_markdown_table(CONTRAST_COLUMNS, contrasts),
            "",
            *(f"- {note}" for note in (*INTERVALS, multiplicity(comparison))),
            "",
        ]
    )


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    # A name of a user must break neither the table nor, where Markdown allows HTML, the page.
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def _markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
