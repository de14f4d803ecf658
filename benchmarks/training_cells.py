"""Cells of the training benchmark: a model, an objective and a precision.

Importing this module imports no torch: a cell's process first silences Megatron-Core's warnings.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

MICRO_BATCH_SLOTS = {"cpu": 4096, "cuda": 2**16}
#: Slots of a step: on a CPU one micro-batch, on a GPU several.
STEP_SLOTS = {"cpu": 4096, "cuda": 2**19}
#: Makes glibc keep freed memory; else a step would measure how fast the kernel clears pages.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}

Figures = dict[str, Any]
"""Figures of a cell by the names that they have in the JSON object."""
Tell = Callable[[Figures], None]
"""Takes figures of a cell that are new."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Settings of one measurement."""

    model: str
    objective: str
    precision: str
    device: str
    data: Path
    rounds: int
    micro_batch_slots: int
    step_slots: int
    cuda_graphs: bool
    peers: bool
    path_cost: bool
    profile: Path | None
    threads: int

    @property
    def name(self) -> str:
        """Model, objective and precision."""
        return f"{self.model} {self.objective} {self.precision}"


def training_cells(
    *,
    models: Sequence[str],
    objectives: Sequence[str],
    precisions: Sequence[str] | None,
    device: str | None,
    micro_batch_tokens: int | None,
    step_tokens: int | None,
    no_peers: bool,
    **shared: Any,
) -> list[Cell]:
    """Return the cells that a command line asks for; `shared` are fields that all of them have.

    Raises:
        ValueError: a cell cannot be measured on the device.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if shared["path_cost"] and device != "cpu":
        raise ValueError("--path-cost is measured on a CPU")
    return [
        Cell(
            model=model,
            objective=objective,
            precision=precision,
            device=device,
            micro_batch_slots=micro_batch_tokens or MICRO_BATCH_SLOTS[device],
            step_slots=step_tokens or STEP_SLOTS[device],
            peers=not no_peers,
            **shared,
        )
        for model in models
        for objective in objectives
        for precision in precisions or ["fp32" if device == "cpu" else "bf16"]
    ]


def measure_cells(
    cells: Sequence[Cell], tell: Callable[[Cell, Figures], None]
) -> Iterator[Figures | None]:
    """Measure every cell; yield its figures, or None for one whose process was killed.

    On a CPU each has a process of its own, which the system kills if memory runs out, and its
    figures are told together. On a GPU all share this one: a GPU without memory only raises, and a
    start takes longer than a measurement. A figure is told as soon as it exists.
    """
    os.environ.update(ALLOCATOR)
    if all(cell.device == "cpu" for cell in cells):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for cell in cells:
        if cell.device == "cuda":
            yield _measure(cell, partial(tell, cell))
            continue
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                figures = process.submit(_measure, cell).result()
        except BrokenProcessPool:
            yield None
        else:
            tell(cell, figures)
            yield figures


def _measure(cell: Cell, tell: Tell = lambda _: None) -> Figures:
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    from benchmarks.training_cell import measure

    return measure(cell, tell)
