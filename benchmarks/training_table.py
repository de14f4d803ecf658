"""Figures of the training benchmark: as lines for people, and as JSON objects."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from tqdm import tqdm

from benchmarks.training_cells import Cell, Figures
from megatron_ettin.devices import GIB
from megatron_ettin.text_table import text_table


def as_text(cell: Cell, figures: Figures) -> str:
    """Return the lines of a cell for people: rates, their ratio to ours, and what else is known."""
    ours = figures["ours_tokens_per_s"]
    contenders = [
        name.removesuffix("_tokens_per_s") for name in figures if name.endswith("_tokens_per_s")
    ]
    rows = []
    for name in contenders:
        rate = figures[f"{name}_tokens_per_s"]
        slowest, fastest = figures[f"{name}_slowest_fastest"]
        mfu, peak = (figures.get(f"{name}_{what}") for what in ("mfu", "peak_memory_bytes"))
        rows.append(
            (
                name,
                f"{rate:,.0f}",
                f"{slowest:,.0f}",
                f"{fastest:,.0f}",
                f"{figures[f'{name}_fill']:.1%}",
                f"{ours / rate:.2f} x",
                "-" if mfu is None else f"{mfu:.1%}",
                "-" if peak is None else f"{peak / GIB:.1f}",
            )
        )
    title = f"{cell.name} on {cell.device}"
    names = (title, "tokens/s", "slowest", "fastest", "fill", "ours is", "MFU", "GiB")
    lines = ["", *text_table(names, rows, numbers=names[1:])]
    if "ours_idle_share" in figures:
        lines.append(f"the GPU is idle for {figures['ours_idle_share']:.1%} of a micro-batch")
    for part, share in figures.get("path_cost", {}).items():
        lines.append(f"Megatron-Core's path costs {share:+.1%} over plain PyTorch: {part}")
    return "\n".join(lines)


def print_report(cell: Cell, figures: Figures | None) -> None:
    """Print what was measured of a cell; `figures` are None if its process was killed."""
    killed = f"\n{cell.name} on {cell.device}: the process was killed"
    tqdm.write(killed if figures is None else as_text(cell, figures))
    sys.stdout.flush()


def print_nothing(_: Cell, __: Figures) -> None:
    """Leave new figures to the report."""


def print_json(cell: Cell, figures: Figures) -> None:
    """Print a line: a JSON object of a cell's settings and of new figures; nothing without any.

    A run that is cut short has said what it knows. On a GPU the figures are those of a variant of a
    contender; on a CPU contenders take turns, and there is one line a cell.
    """
    if not figures:
        return
    settings = {
        "model": cell.model,
        "objective": cell.objective,
        "precision": cell.precision,
        "device": cell.device,
        "cuda_graphs": cell.cuda_graphs,
        "step_slots": cell.step_slots,
    }
    tqdm.write(json.dumps(settings | figures))
    sys.stdout.flush()


def failure(killed: Sequence[Cell]) -> str:
    """Return why these cells have no figures, and what to do."""
    return (
        f"not measured: {', '.join(cell.name for cell in killed)}: the process was killed, by the "
        "system if memory ran out; give a smaller --micro-batch-tokens, or --no-peers"
    )
