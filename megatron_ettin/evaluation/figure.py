"""The figure of a report: loss curves of both twins over tokens, phases, learning rate below."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import Any

from matplotlib.figure import Figure

from megatron_ettin.evaluation.theme import MARKERS, Theme, as_png, as_svg
from megatron_ettin.evaluation.twins import Comparison, Record, Twin

WIDTH_INCHES, HEIGHT_INCHES = 9.0, 6.0
MILLION = 1e6
LINES = {"encoder": "-", "decoder": "--"}
"""Line styles of the learning rates, which coincide where the twins share a schedule."""


def png(comparison: Comparison) -> bytes:
    """Return the figure as a PNG of 1440 x 960 pixels, on a light background."""
    return as_png(partial(_draw, comparison))


def svg(comparison: Comparison, theme: Theme) -> bytes:
    """Return the figure as SVG; the same comparison gives the same bytes."""
    return as_svg(partial(_draw, comparison), theme)


def _draw(comparison: Comparison, theme: Theme) -> Figure:
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1.0))
    handles = []
    for (name, twin), colour, marker in zip(
        comparison.twins.items(), theme.series, MARKERS, strict=False
    ):
        handles += _draw_losses(losses, name, twin, colour, marker)
        rates.plot(
            _tokens(twin.run.training),
            [record["lr"] for record in twin.run.training],
            color=colour,
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


def _draw_losses(axes: Any, name: str, twin: Twin, colour: str, marker: str) -> list[Any]:
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
        marker=marker,
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
