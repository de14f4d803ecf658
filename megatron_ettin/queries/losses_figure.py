"""Figure of the training losses by source over tokens."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

from megatron_ettin.publication import publish_bytes

if TYPE_CHECKING:
    from megatron_ettin.queries.losses import LossPoint

#: Colours, and line styles from the seventh source on; as in `tools/plot.py`.
COLOURS = ("#0a6ebd", "#c4500f", "#0b9a78", "#a2489a", "#8f7300", "#57606a")
STYLES = ("-", "--", ":", "-.")
TEXT, GRID, SHADE = "#24292f", "#d8dee4", "#f3f5f8"
#: Units of the axis of tokens, the largest first.
UNITS = ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (1, ""))
LEGEND_COLUMNS = 5


def write_figure(points: Sequence[LossPoint], path: Path) -> None:
    """Write the figure as a PNG.

    Raises:
        ValueError: there is no point to draw.
    """
    if not points:
        raise ValueError(f"{path}: nothing to draw: no row between --from and --to has a loss")
    output = io.BytesIO()
    draw(points).savefig(output, format="png", dpi=160, metadata={"Software": None})
    publish_bytes(path, output.getvalue())


def draw(points: Sequence[LossPoint]) -> Figure:
    """Draw a line for each source, broken between phases, whose names stand above."""
    last = max(point.run_tokens for point in points)
    scale, unit = next((scale, unit) for scale, unit in UNITS if last >= scale or scale == 1)
    looks: Any = {"font.size": 9.5, "legend.frameon": False}
    looks |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT)
    looks |= dict.fromkeys(("axes.edgecolor", "grid.color"), GRID)
    with matplotlib.rc_context(looks | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.0, 4.6), layout="constrained")
        axes = figure.subplots()
        _draw_phases(axes, points, scale)
        for index, (source, lines) in enumerate(_lines(points).items()):
            style = STYLES[index // len(COLOURS) % len(STYLES)]
            look: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "linestyle": style}
            axes.plot([], [], label=source, **look)  # one entry of the legend for all phases
            for line in lines:
                tokens = [point.run_tokens / scale for point in line]
                marker = "o" if len(line) == 1 else None
                losses = [point.loss for point in line]
                axes.plot(tokens, losses, marker=marker, markersize=3, **look)
        axes.set_xlabel(f"{unit} tokens trained on".strip())
        axes.set_ylabel("training loss (nats per token)")
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
        figure.legend(loc="outside upper left", ncols=LEGEND_COLUMNS)
    return figure


def _lines(points: Sequence[LossPoint]) -> dict[str, list[list[LossPoint]]]:
    """Return the points of each source, phase by phase."""
    lines: dict[str, dict[str, list[LossPoint]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        lines[point.source][point.phase].append(point)
    return {source: list(phases.values()) for source, phases in lines.items()}


def _draw_phases(axes: Any, points: Sequence[LossPoint], scale: int) -> None:
    """Shade every other phase, and name each."""
    phases: dict[str, list[int]] = defaultdict(list)
    for point in points:
        phases[point.phase].append(point.run_tokens)
    begin = 0.0
    for index, (name, tokens) in enumerate(phases.items()):
        following = [min(others) for other, others in phases.items() if min(others) > max(tokens)]
        end = (max(tokens) + min(following)) / 2 if following else max(tokens)
        if index % 2:
            axes.axvspan(begin, end / scale, color=SHADE, linewidth=0)
        place = {"xycoords": ("data", "axes fraction"), "annotation_clip": False}
        axes.annotate(name, (min(tokens) / scale, 1.01), fontsize=8.5, **place)
        begin = end / scale
