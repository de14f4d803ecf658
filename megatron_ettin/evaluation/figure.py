"""The figure of a report: loss curves of both twins over tokens, phases, learning rate below."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from megatron_ettin.evaluation.twins import Comparison, Record, Twin

WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 9.0, 6.0, 160
MILLION = 1e6


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours that are readable on one background."""

    background: str
    text: str
    grid: str
    phase: str
    """Background of every other phase."""
    twins: dict[str, str]
    """Colour of each twin."""


LIGHT = Theme(
    background="#ffffff",
    text="#24292f",
    grid="#d8dee4",
    phase="#f3f5f8",
    twins={"encoder": "#0a6ebd", "decoder": "#c4500f"},
)
DARK = Theme(
    background="#15191f",
    text="#d5dbe3",
    grid="#363e49",
    phase="#1e242c",
    twins={"encoder": "#62b5f5", "decoder": "#f59a5a"},
)
MARKERS = {"encoder": "o", "decoder": "s"}
LINES = {"encoder": "-", "decoder": "--"}
"""Line styles of the learning rates, which coincide where the twins share a schedule."""


def png(comparison: Comparison) -> bytes:
    """Return the figure as a PNG of 1440 x 960 pixels, on a light background."""
    with matplotlib.rc_context(_style(LIGHT)):
        output = io.BytesIO()
        figure = _draw(comparison, LIGHT)
        # Without matplotlib's version in it, the same comparison gives the same bytes.
        figure.savefig(output, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return output.getvalue()


def svg(comparison: Comparison, theme: Theme) -> bytes:
    """Return the figure as SVG; the same comparison gives the same bytes."""
    with matplotlib.rc_context({**_style(theme), "svg.hashsalt": "report", "svg.fonttype": "path"}):
        output = io.BytesIO()
        figure = _draw(comparison, theme)
        figure.savefig(output, format="svg", metadata={"Date": None, "Creator": None})
    return output.getvalue()


def _style(theme: Theme) -> Any:
    return {
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.text,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": theme.text,
        "font.size": 9.5,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "text.color": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
    }


def _draw(comparison: Comparison, theme: Theme) -> Figure:
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1.0))
    handles = []
    for name, twin in comparison.twins.items():
        handles += _draw_losses(losses, name, twin, theme.twins[name])
        rates.plot(
            _tokens(twin.run.training),
            [record["lr"] for record in twin.run.training],
            color=theme.twins[name],
            linestyle=LINES[name],
        )
    _shade_phases(losses, rates, comparison.encoder, theme)
    losses.set_ylabel("loss (nats per scored token)")
    losses.legend(handles=handles, ncols=len(comparison.twins), loc="upper right")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("million tokens trained on")
    rates.set_xlim(0.0, max(_tokens(twin.run.training)[-1] for twin in comparison.twins.values()))
    rates.set_ylim(bottom=0.0)
    rates.ticklabel_format(axis="y", scilimits=(0, 0))
    for axes in (losses, rates):
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    return figure


def _draw_losses(axes: Any, name: str, twin: Twin, colour: str) -> list[Any]:
    """Draw a twin's curve, held-out points and unigram loss; return what the legend shows."""
    training, validation = twin.run.training, twin.run.validation
    (curve,) = axes.plot(
        _tokens(training),
        [record["loss"] for record in training],
        color=colour,
        linewidth=1.1,
        alpha=0.75,
        label=f"{name}: training",
    )
    points = axes.errorbar(
        _tokens(validation),
        [record["heldout_loss"] for record in validation],
        yerr=[record["heldout_standard_error"] for record in validation],
        color=colour,
        linestyle="none",
        marker=MARKERS[name],
        markersize=4.5,
        capsize=2.5,
        label="held-out ± standard error",
        zorder=3,
        # The last point lies on the right edge of the axes and would be cut in half.
        clip_on=False,
    )
    unigram = axes.axhline(
        twin.unigram.loss,
        color=colour,
        linestyle=":",
        linewidth=1.3,
        label="unigram, held-out",
    )
    return [curve, points, unigram]


def _shade_phases(losses: Any, rates: Any, twin: Twin, theme: Theme) -> None:
    # A report names the phase that it ends in, so a phase reaches to its last report.
    begin = 0.0
    for index, (name, records) in enumerate(groupby(twin.run.training, lambda r: r["phase"])):
        end = _tokens(list(records))[-1]
        if index % 2:
            for axes in (losses, rates):
                axes.axvspan(begin, end, color=theme.phase, zorder=0, linewidth=0)
        losses.annotate(
            name,
            ((begin + end) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
        )
        begin = end


def _tokens(records: list[Record]) -> list[float]:
    return [record["tokens"] / MILLION for record in records]
