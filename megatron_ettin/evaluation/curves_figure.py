"""Figure of runs over tokens: losses, learning rate, throughput, with phases and marks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_ettin.evaluation.run_curves import MarkKind, PhaseStretch, RunCurves, smoothed
from megatron_ettin.evaluation.theme import MARKERS, Theme

WIDTH_INCHES = 10.5
MILLION = 1e6
#: Line styles beside the colours: from the seventh run on, colours repeat in the next style.
STYLES: tuple[Any, ...] = ("-", "--", ":", "-.")
#: Marker and face (filled or not) of what happened between steps.
MARKS: dict[MarkKind, tuple[str, bool]] = {
    "checkpoint": ("o", False),
    "fork": ("X", True),
    "skip": ("d", True),
}
LEGEND = {"checkpoint": "checkpoint", "fork": "fork: resumed from here", "skip": "rows skipped"}
#: Length of a dash of a unigram loss, in line widths.
DASH = 4.0
#: Width of a letter as a share of the panels' width, for names of phases that fit into them.
LETTER = 0.0085
#: Letters of the names at the left of a lane; more are counted instead.
MAX_LETTERS = 22


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Theme and titles of a figure of runs."""

    theme: Theme
    titles: dict[str, str] = field(default_factory=dict)
    """Text of each part that has an id: an SVG shows it under the pointer."""

    def look(self, index: int) -> dict[str, Any]:
        """Return colour and line style of a run, by its place among the runs."""
        colours = self.theme.series
        style = STYLES[index // len(colours) % len(STYLES)]
        return {"color": colours[index % len(colours)], "linestyle": style}

    def name(self, index: int, part: str, title: str) -> str:
        """Return the id of a part of a run, and note its title."""
        identity = f"run{index}-{part}"
        self.titles[identity] = title
        return identity


def draw_curves(
    runs: Sequence[RunCurves],
    theme: Theme,
    *,
    titles: dict[str, str] | None = None,
    legend: bool = True,
) -> Figure:
    """Draw all runs over the tokens that each has trained on; the legend is above all panels.

    `titles` takes the title of every part by its id, `run0-loss` for example.
    """
    canvas = Canvas(theme=theme, titles={} if titles is None else titles)
    lanes = phase_lanes(runs)
    panels: list[tuple[float, Callable[..., None]]] = [(3.0, _draw_losses)]
    if any(run.validation for run in runs):
        panels.append((2.4, _draw_held_out))
    panels += [(1.5, _draw_learning_rates), (1.8, _draw_throughput)]
    heights = [0.26 * len(lanes), *(height for height, _ in panels)]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 1.2), layout="constrained")
    strip, *axes_of_panels = figure.subplots(
        len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights}
    )
    last = max(run.tokens for run in runs) / MILLION
    _draw_lanes(strip, lanes, last, theme)
    for axes, (_, draw) in zip(axes_of_panels, panels, strict=True):
        draw(axes, runs, canvas)
        _draw_phase_ends(axes, lanes, theme)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    axes_of_panels[-1].set_xlabel("million tokens trained on")
    axes_of_panels[-1].set_xlim(0.0, last)
    if legend:
        _draw_legend(figure, runs, canvas)
    return figure


def phase_lanes(runs: Sequence[RunCurves]) -> dict[tuple[PhaseStretch, ...], list[str]]:
    """Return the sequences of phases that differ, each with the names of its runs.

    A run that has not come as far as another shares its lane.
    """
    found: dict[tuple[PhaseStretch, ...], list[str]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.tokens, reverse=True):
        own = run.phases
        lane = next((lane for lane in found if _begins_with(lane, own)), own)
        found[lane].append(run.name)
    order = [run.name for run in runs]
    return {lane: sorted(names, key=order.index) for lane, names in found.items()}


def _begins_with(lane: Sequence[PhaseStretch], own: Sequence[PhaseStretch]) -> bool:
    """Tell whether a run whose phases are `own` may be a part of `lane`."""
    if len(own) > len(lane):
        return False
    *whole, last = own
    there = lane[len(own) - 1]
    same = (last.name, last.begin) == (there.name, there.begin) and last.end <= there.end
    return list(lane[: len(whole)]) == whole and same


def _draw_lanes(
    axes: Any, lanes: dict[tuple[PhaseStretch, ...], list[str]], last: float, theme: Theme
) -> None:
    """Draw a lane for each sequence of phases, with the names of those that are wide enough."""
    for row, phases in enumerate(lanes):
        for index, phase in enumerate(phases):
            begin, width = phase.begin / MILLION, (phase.end - phase.begin) / MILLION
            colour = theme.grid if index % 2 else theme.phase
            axes.broken_barh(
                [(begin, width)],
                (row - 0.42, 0.84),
                facecolor=colour,
                edgecolor=theme.grid,
                linewidth=0.6,
            )
            if len(phase.name) * LETTER <= width / last:
                axes.text(
                    begin + width / 2, row, _plain(phase.name), ha="center", va="center", fontsize=8
                )
    several = len(lanes) > 1
    texts = [_runs_of_lane(names) if several else "phases" for names in lanes.values()]
    axes.set_yticks(range(len(lanes)), texts, fontsize=8)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.tick_params(length=0, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _runs_of_lane(names: Sequence[str]) -> str:
    text = ", ".join(names)
    if len(text) <= MAX_LETTERS:
        return _plain(text)
    return f"{len(names)} runs" if len(names) > 1 else _plain(text[: MAX_LETTERS - 1] + "…")


def _draw_phase_ends(
    axes: Any, lanes: dict[tuple[PhaseStretch, ...], list[str]], theme: Theme
) -> None:
    for end in sorted({phase.end for phases in lanes for phase in phases[:-1]}):
        axes.axvline(end / MILLION, color=theme.grid, linewidth=1.0, zorder=0)


def _draw_losses(axes: Any, runs: Sequence[RunCurves], canvas: Canvas) -> None:
    """Draw each report thin, their means over it, and the marks on these."""
    for index, run in enumerate(runs):
        tokens, losses = run.series("loss")
        look = canvas.look(index)
        title = f"{run.name}: training loss"
        axes.plot(
            tokens / MILLION, losses, **look, linewidth=0.6, alpha=0.3,
            gid=canvas.name(index, "loss", title),
        )  # fmt: skip
        axes.plot(
            tokens / MILLION, smoothed(losses), **look, linewidth=1.5,
            gid=canvas.name(index, "smoothed", f"{title}, smoothed"),
        )  # fmt: skip
        for number, mark in enumerate(run.marks):
            marker, is_filled = MARKS[mark.kind]
            text = f"{run.name}: {mark.text}, step {mark.step:,}, {mark.tokens:,} tokens"
            axes.plot(
                [mark.tokens / MILLION], [run.loss_at(mark.tokens)], linestyle="none",
                marker=marker, markersize=5 if mark.kind == "checkpoint" else 8,
                markeredgecolor=look["color"],
                markerfacecolor=look["color"] if is_filled else canvas.theme.background,
                markeredgewidth=1.0, zorder=3 if mark.kind == "checkpoint" else 4, clip_on=False,
                gid=canvas.name(index, f"mark-{number}", text),
            )  # fmt: skip
    axes.set_ylabel("training loss (nats)")


def _draw_held_out(axes: Any, runs: Sequence[RunCurves], canvas: Canvas) -> None:
    """Draw each held-out loss with two standard errors on either side, and the unigram losses.

    The dashes of a run's unigram loss lie in the gaps of the others', so that equal ones are seen.
    """
    unigrams = [index for index, run in enumerate(runs) if run.unigram is not None]
    for place, index in enumerate(unigrams):
        title = f"{runs[index].name}: unigram, held-out {runs[index].unigram:.4f}"
        gap = DASH * max(1, len(unigrams) - 1)
        axes.axhline(
            runs[index].unigram, color=canvas.look(index)["color"], linewidth=1.4,
            linestyle=(-place * DASH, (DASH, gap)), gid=canvas.name(index, "unigram", title),
        )  # fmt: skip
    for index, run in enumerate(runs):
        look = canvas.look(index)
        tokens, losses = run.series("heldout_loss")
        title = f"{run.name}: held-out loss"
        axes.plot(
            tokens / MILLION, losses, **look, linewidth=1.2,
            gid=canvas.name(index, "heldout", title),
        )  # fmt: skip
        for number, line in enumerate(run.validation):
            at, loss, error = (line["tokens"] / MILLION, line["heldout_loss"],
                               line.get("heldout_standard_error", 0.0))  # fmt: skip
            text = f"{title} {loss:.4f} ± {error:.4f} at {line['tokens']:,} tokens"
            axes.plot(
                [at, at], [loss - 2 * error, loss + 2 * error], color=look["color"],
                linewidth=1.2, gid=canvas.name(index, f"error-{number}", text), clip_on=False,
            )  # fmt: skip
            axes.plot(
                [at], [loss], linestyle="none", color=look["color"],
                marker=MARKERS[index % len(MARKERS)], markersize=5,
                markeredgecolor=canvas.theme.background, markeredgewidth=0.6, zorder=3,
                clip_on=False, gid=canvas.name(index, f"point-{number}", text),
            )  # fmt: skip
    axes.set_ylabel("held-out loss (nats)")


def _draw_learning_rates(axes: Any, runs: Sequence[RunCurves], canvas: Canvas) -> None:
    for index, run in enumerate(runs):
        tokens, rates = run.learning_rates()
        gid = canvas.name(index, "lr", f"{run.name}: learning rate")
        # Runs of one schedule would hide each other: later ones are thinner.
        width = 1.3 + 3.2 * (len(runs) - 1 - index) / max(len(runs) - 1, 1)
        axes.plot(tokens / MILLION, rates, **canvas.look(index), linewidth=width, gid=gid)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0.0)
    axes.ticklabel_format(axis="y", scilimits=(0, 0))


def _draw_throughput(axes: Any, runs: Sequence[RunCurves], canvas: Canvas) -> None:
    for index, run in enumerate(runs):
        tokens, rates = run.series("tokens_per_second")
        look, title = canvas.look(index), f"{run.name}: throughput"
        for part, values, width, alpha in (
            ("speed", rates, 0.5, 0.25),
            ("mean-speed", smoothed(rates), 1.4, 1.0),
        ):
            gid = canvas.name(index, part, title)
            axes.plot(tokens / MILLION, values / 1e3, **look, lw=width, alpha=alpha, gid=gid)
    axes.set_ylabel("thousand tokens/s")
    axes.set_ylim(bottom=0.0)


def _draw_legend(figure: Figure, runs: Sequence[RunCurves], canvas: Canvas) -> None:
    """Draw the runs' lines, and the marks that are there, above all panels."""
    handles: list[Line2D] = []
    for index, _ in enumerate(runs):
        marker = MARKERS[index % len(MARKERS)]
        handles.append(Line2D([], [], **canvas.look(index), marker=marker, linewidth=1.6))
    kinds = [kind for kind in MARKS if any(m.kind == kind for run in runs for m in run.marks)]
    for kind in kinds:
        marker, is_filled = MARKS[kind]
        face = canvas.theme.text if is_filled else canvas.theme.background
        handles.append(
            Line2D([], [], linestyle="none", marker=marker, color=canvas.theme.text,
                   markerfacecolor=face)
        )  # fmt: skip
    labels = [*(_plain(run.name) for run in runs), *(LEGEND[kind] for kind in kinds)]
    if any(run.unigram is not None for run in runs):
        look = (0.0, (DASH, DASH))
        handles.append(Line2D([], [], color=canvas.theme.text, linewidth=1.4, linestyle=look))
        labels.append("unigram, held-out")
    columns = max(1, min(len(labels), 100 // (max(map(len, labels)) + 8)))
    figure.legend(
        handles, labels, loc="outside upper center", ncols=columns, fontsize=9, handlelength=2.4
    )


def _plain(text: str) -> str:
    """Return a text that matplotlib draws as it is, not as a formula."""
    return text.replace("$", r"\$")
