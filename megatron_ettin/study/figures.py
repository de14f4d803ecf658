"""Figures of a study's page: scores by arm and size, losses over tokens, scores of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_ettin.evaluation.scores import Score
from megatron_ettin.evaluation.theme import MARKERS, Theme
from megatron_ettin.study.comparison import Number, Quantity, StudyComparison
from megatron_ettin.study.history import STANDARD_ERRORS, CheckpointScore, History

WIDTH_INCHES, PANEL_INCHES = 10.5, 3.1
MAX_COLUMNS = 3
MAX_LEGEND_COLUMNS = 5
#: Points of one task lie within this share of the distance to the next task.
SPREAD = 0.5
#: Tasks in a row of panels.
MAX_TASKS = 7
MILLION = 1e6
#: Names that are longer are set slanted below an axis.
LONG_NAME = 9


@dataclass(frozen=True)
class Palette:
    """Colour and marker of each arm: the same in all figures."""

    theme: Theme
    arms: Sequence[str]

    def colour(self, arm: str) -> str:
        """Return an arm's colour; colours repeat from the seventh arm on."""
        return self.theme.series[self.arms.index(arm) % len(self.theme.series)]

    def marker(self, arm: str) -> str:
        """Return an arm's marker."""
        return MARKERS[self.arms.index(arm) % len(MARKERS)]

    def legend(self, figure: Figure, arms: Sequence[str], more: Sequence[Line2D] = ()) -> None:
        """Draw the legend above all panels, off the data."""
        handles = [
            Line2D(
                [], [], color=self.colour(arm), marker=self.marker(arm), linewidth=1.4, label=arm
            )
            for arm in self.arms
            if arm in arms
        ]
        count = len(handles) + len(more)
        rows = math.ceil(count / MAX_LEGEND_COLUMNS)
        figure.legend(
            handles=[*handles, *more],
            loc="outside upper center",
            ncols=math.ceil(count / rows),
            fontsize=10,
            handlelength=2.2,
        )

    def line(self, label: str, linestyle: Literal["-", ":"]) -> Line2D:
        """Return a line of the legend that belongs to no arm."""
        return Line2D([], [], color=self.theme.text, linestyle=linestyle, linewidth=1, label=label)


def draw_scores(comparison: StudyComparison, theme: Theme) -> Figure:
    """Draw the first score of each task: families, arms and sizes, as the paper's Figure 1."""
    palette = Palette(theme, comparison.arms)
    sizes = [s for s in comparison.sizes if any(q.size == s for q in comparison.by_quantity)]
    if len(sizes) > 1:
        figure = _scores_over_sizes(comparison, sizes, palette)
    else:
        figure = _scores_of_one_size(comparison, sizes[0], palette)
    there = {number.arm for number in comparison.numbers}
    has_chance = any(number.score.chance is not None for number in comparison.numbers)
    more = [palette.line("chance", ":")] if has_chance else []
    palette.legend(figure, sorted(there, key=comparison.arms.index), more)
    return figure


def _scores_of_one_size(comparison: StudyComparison, size: str, palette: Palette) -> Figure:
    panels = [
        (family, quantities)
        for family in comparison.families
        if (quantities := comparison.figure_quantities(family, size))
    ]
    rows = _rows_of_panels([len(quantities) for _, quantities in panels])
    widest = max(sum(len(panels[index][1]) + 0.6 for index in row) for row in rows)
    figure = Figure(figsize=(WIDTH_INCHES, 0.7 + 3.4 * len(rows)), layout="constrained")
    bands = figure.subfigures(len(rows), 1, squeeze=False)
    for band, row in zip(bands[:, 0], rows, strict=True):
        chosen = [panels[index] for index in row]
        widths = [len(quantities) + 0.6 for _, quantities in chosen]
        # An empty panel keeps the tasks of a short row as wide as those of the others.
        widths += [rest] if (rest := widest - sum(widths)) > 1.0 else []
        axes_of_row = band.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
        for unused in axes_of_row[len(chosen) :]:
            unused.set_axis_off()
        for axes, (family, quantities) in zip(axes_of_row, chosen, strict=False):
            _draw_tasks(axes, comparison, quantities, palette)
            axes.set_title(family, fontsize=11, fontweight="bold", loc="left")
    return figure


def _rows_of_panels(tasks: Sequence[int]) -> list[list[int]]:
    """Divide panels with these numbers of tasks into rows of about equally many tasks."""
    per_row = sum(tasks) / math.ceil(sum(tasks) / MAX_TASKS)
    rows: list[list[int]] = [[]]
    for index in range(len(tasks)):
        if sum(tasks[:index]) >= per_row * len(rows):
            rows.append([])
        rows[-1].append(index)
    return rows


def _draw_tasks(
    axes: Any, comparison: StudyComparison, quantities: Sequence[Quantity], palette: Palette
) -> None:
    """Draw tasks side by side: a point with its interval for each arm, and the chance."""
    for position, quantity in enumerate(quantities):
        numbers = comparison.by_quantity[quantity]
        places = _places(position, len(numbers))
        for place, (arm, number) in zip(places, numbers.items(), strict=True):
            _draw_points(axes, [place], [number.score], palette, arm, joined=False)
        _draw_chance(axes, list(numbers.values()), palette, position - 0.42, position + 0.42)
    names = [quantity.task for quantity in quantities]
    slanted = len(names) > 1 and max(map(len, names)) > LONG_NAME
    axes.set_xticks(
        range(len(names)),
        names,
        rotation=25 if slanted else 0,
        ha="right" if slanted else "center",
        rotation_mode="anchor",
    )
    axes.set_xlim(-0.55, len(names) - 0.45)
    axes.tick_params(axis="x", length=0)
    metrics = dict.fromkeys(
        number.score.metric for q in quantities for number in comparison.by_quantity[q].values()
    )
    axes.set_ylabel(", ".join(metrics))
    _finish(axes)


def _places(centre: float, count: int) -> list[float]:
    """Return `count` places around a centre, at equal distances."""
    step = SPREAD / max(count - 1, 1) if count > 1 else 0.0
    return [centre + step * (index - (count - 1) / 2) for index in range(count)]


def _scores_over_sizes(
    comparison: StudyComparison, sizes: Sequence[str], palette: Palette
) -> Figure:
    panels = list(
        dict.fromkeys(
            (family, quantity.task)
            for family in comparison.families
            for size in sizes
            for quantity in comparison.figure_quantities(family, size)
        )
    )
    figure, grid = _grid(len(panels))
    for axes, (family, task) in zip(grid, panels, strict=True):
        drawn: list[Number] = []
        for index, arm in enumerate(comparison.arms):
            numbers = [
                (sizes.index(number.quantity.size), number)
                for number in comparison.numbers
                if number.arm == arm and number.quantity.is_first and number.quantity.task == task
            ]
            shift = 0.05 * (index - (len(comparison.arms) - 1) / 2)
            places = [place + shift for place, _ in numbers]
            scores = [number.score for _, number in numbers]
            _draw_points(axes, places, scores, palette, arm, joined=True)
            drawn += [number for _, number in numbers]
        _draw_chance(axes, drawn, palette, -0.3, len(sizes) - 0.7)
        axes.set_xticks(range(len(sizes)), sizes)
        axes.set_xlim(-0.3, len(sizes) - 0.7)
        axes.set_title(f"{family}: {task}", fontsize=10.5, fontweight="bold", loc="left")
        axes.set_ylabel(drawn[0].score.metric)
        _finish(axes)
    return figure


def draw_losses(histories: Sequence[History], arms: Sequence[str], theme: Theme) -> Figure:
    """Draw training and held-out losses over tokens; crossing arms begin where their start ends."""
    palette = Palette(theme, arms)
    sizes = list(dict.fromkeys(history.model.size for history in histories))
    figure, grid = _grid(len(sizes), columns=min(len(sizes), 2), inches=3.6)
    for axes, size in zip(grid, sizes, strict=True):
        for history in histories:
            if history.model.size == size:
                _draw_history(axes, history, palette)
        axes.set_xlabel("million tokens trained on, those of the starting arm counted")
        axes.set_ylabel("loss (nats per scored token)")
        if len(sizes) > 1:
            axes.set_title(size, fontsize=10.5, fontweight="bold", loc="left")
        axes.set_xlim(left=0.0)
        _finish(axes)
    more = [
        palette.line("training", "-"),
        Line2D([], [], color=theme.text, linestyle="none", marker="o", label="held-out"),
    ]
    palette.legend(figure, [history.model.arm for history in histories], more)
    return figure


def draw_held_out(histories: Sequence[History], arms: Sequence[str], theme: Theme) -> Figure:
    """Draw the last held-out loss of each run, in a panel for each kind of loss and size."""
    palette = Palette(theme, arms)
    measured = [history for history in histories if history.held_out is not None]
    panels = list(dict.fromkeys((h.model.size, h.loss_kind) for h in measured))
    num_sizes = len({size for size, _ in panels})
    figure, grid = _grid(len(panels))
    for axes, (size, kind) in zip(grid, panels, strict=True):
        chosen = [h for h in measured if (h.model.size, h.loss_kind) == (size, kind)]
        for place, history in enumerate(chosen):
            _draw_held_out(axes, [place], history.validation[-1:], history.model.arm, palette)
        axes.set_xticks([])
        axes.set_xlim(-0.6, len(chosen) - 0.4)
        axes.set_title(f"{size}: {kind}" if num_sizes > 1 else kind, fontsize=10.5, loc="left")
        axes.set_ylabel("held-out loss (nats per token)")
        _finish(axes)
    palette.legend(figure, [history.model.arm for history in measured])
    return figure


def _draw_history(axes: Any, history: History, palette: Palette) -> None:
    arm = history.model.arm

    def millions(records: Sequence[Any]) -> list[float]:
        return [(history.start_tokens + record["tokens"]) / MILLION for record in records]

    axes.plot(
        millions(history.training),
        [record["loss"] for record in history.training],
        color=palette.colour(arm),
        linewidth=1.0,
        alpha=0.6,
    )
    _draw_held_out(axes, millions(history.validation), history.validation, arm, palette)


def _draw_held_out(
    axes: Any, places: Sequence[float], records: Sequence[Any], arm: str, palette: Palette
) -> None:
    """Draw held-out losses with intervals of 95 % over the held-out rows."""
    axes.errorbar(
        places,
        [record["heldout_loss"] for record in records],
        yerr=[STANDARD_ERRORS * record["heldout_standard_error"] for record in records],
        color=palette.colour(arm),
        linestyle="none",
        marker=palette.marker(arm),
        markersize=5,
        markeredgecolor=palette.theme.background,
        markeredgewidth=0.6,
        capsize=2.5,
        zorder=3,
    )


def draw_checkpoints(
    checkpoints: Sequence[CheckpointScore], arms: Sequence[str], theme: Theme
) -> Figure:
    """Draw the scores of checkpoints over tokens, with intervals over items."""
    palette = Palette(theme, arms)
    panels = list(dict.fromkeys((c.size, c.family, c.task) for c in checkpoints))
    num_sizes = len({size for size, _, _ in panels})
    figure, grid = _grid(len(panels))
    for axes, (size, family, task) in zip(grid, panels, strict=True):
        chosen = [c for c in checkpoints if (c.size, c.family, c.task) == (size, family, task)]
        for arm, seed in dict.fromkeys((c.arm, c.training_seed) for c in chosen):
            points = [c for c in chosen if (c.arm, c.training_seed) == (arm, seed)]
            tokens = [point.tokens / MILLION for point in points]
            _draw_points(axes, tokens, [p.score for p in points], palette, arm, joined=True)
        chance = chosen[0].score.chance
        if chance is not None:
            axes.axhline(chance, color=palette.theme.text, linestyle=":", linewidth=1.0)
        name = f"{size}, {task}" if num_sizes > 1 else f"{family}: {task}"
        axes.set_title(name, fontsize=10.5, fontweight="bold", loc="left")
        axes.set_xlabel("million tokens")
        axes.set_ylabel(chosen[0].score.metric)
        _finish(axes)
    has_chance = any(c.score.chance is not None for c in checkpoints)
    more = [palette.line("chance", ":")] if has_chance else []
    palette.legend(figure, [c.arm for c in checkpoints], more)
    return figure


def _grid(
    count: int, columns: int = MAX_COLUMNS, inches: float = PANEL_INCHES
) -> tuple[Figure, list[Any]]:
    """Return a figure and its `count` panels, row by row."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH_INCHES, 0.6 + inches * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in panels[count:]:
        unused.set_axis_off()
    return figure, panels[:count]


def _draw_points(
    axes: Any,
    places: Sequence[float],
    scores: Sequence[Score],
    palette: Palette,
    arm: str,
    *,
    joined: bool,
) -> None:
    """Draw values with their intervals over items, with a line through them if `joined`."""
    values = [score.value for score in scores]
    # A percentile interval of a corpus metric may lie on one side of the value.
    below = [max(0.0, score.value - score.interval.low) for score in scores]
    above = [max(0.0, score.interval.high - score.value) for score in scores]
    axes.errorbar(
        places,
        values,
        yerr=[below, above],
        color=palette.colour(arm),
        linestyle="-" if joined else "none",
        linewidth=1.2,
        elinewidth=1.5,
        marker=palette.marker(arm),
        markersize=6.5,
        markeredgecolor=palette.theme.background,
        markeredgewidth=0.7,
        capsize=3,
        zorder=3,
    )


def _draw_chance(
    axes: Any, numbers: Sequence[Number], palette: Palette, left: float, right: float
) -> None:
    for chance in {n.score.chance for n in numbers if n.score.chance is not None}:
        axes.hlines(chance, left, right, color=palette.theme.text, linestyle=":", linewidth=1.1)


def _finish(axes: Any) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.margins(y=0.12)
