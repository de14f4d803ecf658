"""Pretrain with a rank that hangs once: `torchrun tests/hanging.py HOW ...`, for tests of hangs.

Rank 1 of a run's first start hangs when it prepares step 5.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from megatron_ettin import pretrain
from megatron_ettin.training import preparation

STEP = 5


def hang(how: str) -> None:
    """Block for longer than any test takes."""
    if how == "sleep":
        time.sleep(10_000)  # the line that hangs
    else:
        # As C code does that reads a mapped file of a server that is gone: it keeps Python's lock.
        ctypes.PyDLL(None).sleep(10_000)


def hanging_steps(how: str) -> Any:
    """Return `phase_steps` with the hang."""
    phase_steps = preparation.phase_steps

    def steps(*arguments: Any) -> Iterator[preparation.StepRange]:
        for step in phase_steps(*arguments):
            if step.step == STEP:
                hang(how)
            yield step

    return steps


if __name__ == "__main__":
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        preparation.phase_steps = hanging_steps(sys.argv[1])
    del sys.argv[1]
    pretrain.main()
