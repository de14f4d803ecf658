"""Figure of the plans: tokens and pieces per row, phase by phase."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megatron_ettin.order import Order
from megatron_ettin.publication import publish_bytes

MAX_ROWS = 1_000_000
"""Rows of a phase in the histograms; longer phases are subsampled to at most this many."""
CHUNK_ROWS = 65_536
BINS = 64
GREY, BLACK = "#9a9a9a", "#000000"


def write_figure(order: Order, path: Path) -> None:
    """Write the figure as a PNG."""
    output = io.BytesIO()
    draw(order).savefig(output, format="png", dpi=150, metadata={"Software": None})
    publish_bytes(path, output.getvalue())


def draw(order: Order) -> Figure:
    """Return two histograms per phase, readable in black and white.

    They count the rows of one epoch of the phase's pools: every n-th row, as the title says, if
    there are more than MAX_ROWS.
    """
    phases = order.spec.phases
    with matplotlib.rc_context({"font.size": 9.5, "axes.spines.right": False}):
        figure = Figure(figsize=(9.0, 2.8 * len(phases)), layout="constrained")
        for index, axes in enumerate(figure.subplots(len(phases), 2, squeeze=False)):
            _draw_phase(order, index, axes)
    return figure


def _draw_phase(order: Order, phase_index: int, axes: Any) -> None:
    phase = order.spec.phases[phase_index]
    tokens, pieces, stride = sample_rows(order, phase_index)
    total = sum(pool.rows for pool in phase.pools)
    sample = f"every {stride}th of " if stride > 1 else ""
    mean = tokens.mean() / phase.seq_length
    edges = np.linspace(0, phase.seq_length, BINS + 1)
    axes[0].hist(tokens, edges, color=GREY, edgecolor=BLACK, linewidth=0.5)
    axes[0].axvline(tokens.mean(), color=BLACK, linestyle="--", linewidth=1.0)
    axes[0].set_title(f"{phase.name}: {sample}{total:,} rows, {mean:.2%} full", loc="left")
    axes[0].set_xlabel(f"tokens of a row (length {phase.seq_length}; dashed: mean)")
    most = int(pieces.max())
    width = -(-most // BINS)
    edges = np.arange(0.5, most + width + 0.5, width)
    axes[1].hist(pieces, edges, color=GREY, edgecolor=BLACK, linewidth=0.5)
    axes[1].set_title(f"{pieces.mean():.2f} pieces a row, at most {most}", loc="left")
    axes[1].set_xlabel("pieces of a row")
    for each in axes:
        each.set_ylabel("rows")
        each.set_yscale("log")
        # On a log scale, a limit below 1 makes a bar of one row visible.
        each.set_ylim(bottom=0.5)


def sample_rows(order: Order, phase_index: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Return tokens [n] and pieces [n] of every n-th row of a phase, and n."""
    total = sum(pool.rows for pool in order.spec.phases[phase_index].pools)
    stride = -(-total // MAX_ROWS)
    tokens, pieces = [], []
    for pool, plan in order.plans(phase_index):
        sample = np.arange(0, pool.rows, stride, dtype=np.int64)
        for begin in range(0, len(sample), CHUNK_ROWS):
            rows = sample[begin : begin + CHUNK_ROWS]
            tokens.append(plan.row_tokens(rows).astype(np.int64))
            pieces.append(np.diff(plan.pieces(rows).splits))
    return np.concatenate(tokens), np.concatenate(pieces), stride
