"""Four gloo processes of rank_program.py: what each layout makes of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.parity import rank_program
from tests.ranks import free_ports, run_ranks

#: Layouts in which a checkpoint is compared, and the processes that each takes.
LAYOUTS = {"tp2": 2, "pp2": 2, "tp2pp2": 4}


def compare_layouts(
    checkpoint: Path, expected: Path, output: Path, *, saving: Sequence[str], deadline: float
) -> dict[str, float]:
    """Return the difference from `expected` by layout; those of `saving` leave output/LAYOUT.

    Fails with the output of the first rank that fails, or is late by `deadline` seconds.
    """
    job = rank_program.Job(checkpoint, expected, output, saving, free_ports(3))
    run_ranks(
        rank_program.main,
        [job],
        ranks=max(LAYOUTS.values()),
        logs=output,
        deadline_seconds=deadline,
    )
    return {layout: json.loads((output / f"{layout}.json").read_text()) for layout in LAYOUTS}
