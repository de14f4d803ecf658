"""Figure of corpora: how long their documents are, by documents and by tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter
from numpy.typing import NDArray

from megatron_ettin.data.inspection.length_histogram import LengthHistogram
from megatron_ettin.evaluation.theme import Theme, as_png
from megatron_ettin.publication import publish_bytes

WIDTH_INCHES, HEIGHT_INCHES = 9.0, 5.6
BINS = 48
#: Line styles beside the colours, for prints without colour.
STYLES: tuple[Any, ...] = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))
#: Corpora whose bars are filled; the colours of more would mix to grey.
MAX_FILLED = 2


def write_figure(histograms: Mapping[str, LengthHistogram], path: Path) -> None:
    """Write the figure as a PNG; ValueError if no corpus has a document."""
    publish_bytes(path, as_png(partial(draw, histograms)))


def draw(histograms: Mapping[str, LengthHistogram], theme: Theme) -> Figure:
    """Return two histograms over the length on a log scale, with a line for each corpus."""
    lengths = np.concatenate([histogram.lengths for histogram in histograms.values()])
    lengths = lengths[lengths > 0]
    if not len(lengths):
        raise ValueError("no document to draw the length of")
    edges = bin_edges(int(lengths.max()))
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    is_filled = len(histograms) <= MAX_FILLED
    for index, (prefix, histogram) in enumerate(histograms.items()):
        look = {
            "color": theme.series[index % len(theme.series)],
            "linestyle": STYLES[index % len(STYLES)],
        }
        label = f"{Path(prefix).name}: {histogram.documents.sum():,} documents"
        _draw_shares(
            panels[0], histogram, histogram.documents, edges, label, look, is_filled=is_filled
        )
        label = f"{Path(prefix).name}: {histogram.tokens.sum():,} tokens"
        _draw_shares(
            panels[1], histogram, histogram.tokens, edges, label, look, is_filled=is_filled
        )
    for axes, what in zip(panels, ("documents", "tokens"), strict=True):
        axes.set_ylabel(f"{what} per doubling")
        axes.set_ylim(bottom=0.0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
    panels[1].set_xscale("log")
    panels[1].set_xlim(lengths.min() - 0.5, edges[-1])
    panels[1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panels[1].set_xlabel("length of a document in tokens (dotted line: half are below)")
    return figure


def bin_edges(longest: int) -> NDArray[np.float64]:
    """Return edges between whole lengths 1 to `longest`, evenly spaced on a log scale.

    Short lengths have a bin each.
    """
    begins = np.unique(np.rint(np.geomspace(1, longest + 1, BINS + 1)))
    return np.asarray(begins - 0.5, dtype=np.float64)


def shares_per_doubling(
    histogram: LengthHistogram, weights: NDArray[np.int64], edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return each bin's share of the weights, divided by the doublings of length it spans.

    So bins of different widths compare, and the area is 1.
    """
    totals, _ = np.histogram(histogram.lengths, edges, weights=weights)
    shares: NDArray[np.float64] = totals / max(1, weights.sum()) / np.diff(np.log2(edges))
    return shares


def _draw_shares(
    axes: Any,
    histogram: LengthHistogram,
    weights: NDArray[np.int64],
    edges: NDArray[np.float64],
    label: str,
    look: dict[str, Any],
    *,
    is_filled: bool,
) -> None:
    shares = shares_per_doubling(histogram, weights, edges)
    if is_filled:
        axes.stairs(shares, edges, fill=True, color=look["color"], alpha=0.15)
    axes.stairs(shares, edges, linewidth=1.4, label=label, **look)
    cumulative = np.cumsum(weights)
    if len(cumulative):
        median = histogram.lengths[np.searchsorted(cumulative, cumulative[-1] / 2)]
        axes.axvline(median, color=look["color"], linestyle=":", linewidth=1.1)
