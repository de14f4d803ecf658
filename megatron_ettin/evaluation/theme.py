"""Colours of figures and pages on light and dark screens, and figures as bytes in these colours."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

DOTS_PER_INCH = 160


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours that are readable on one background."""

    background: str
    text: str
    grid: str
    phase: str
    """Background of every other phase."""
    series: tuple[str, ...]
    """Colours of what is compared, in its order; colour-blind readers can tell the first six apart.
    """


LIGHT = Theme(
    background="#ffffff",
    text="#24292f",
    grid="#d8dee4",
    phase="#f3f5f8",
    series=("#0a6ebd", "#c4500f", "#0b9a78", "#a2489a", "#8f7300", "#57606a"),
)
DARK = Theme(
    background="#15191f",
    text="#d5dbe3",
    grid="#363e49",
    phase="#1e242c",
    series=("#62b5f5", "#f59a5a", "#3ecfa5", "#e08fd6", "#e0cb55", "#aab4bf"),
)
#: Markers in the same order, for prints without colour.
MARKERS = ("o", "s", "^", "D", "v", "P")

Draw = Callable[[Theme], Figure]


def as_png(draw: Draw) -> bytes:
    """Return a figure as PNG, on a light background."""
    with matplotlib.rc_context(_style(LIGHT)):
        output = io.BytesIO()
        # Without matplotlib's version in it, the same figure gives the same bytes.
        draw(LIGHT).savefig(output, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return output.getvalue()


def as_svg(draw: Draw, theme: Theme) -> bytes:
    """Return a figure as SVG; the same figure gives the same bytes."""
    with matplotlib.rc_context(
        {**_style(theme), "svg.hashsalt": "megatron_ettin", "svg.fonttype": "path"}
    ):
        output = io.BytesIO()
        draw(theme).savefig(output, format="svg", metadata={"Date": None, "Creator": None})
    return output.getvalue()


def as_data_url(svg: bytes) -> str:
    """Return an SVG as the value of an attribute that holds an image's address."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


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
