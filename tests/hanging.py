"""Pretrain with a rank that hangs once, for tests of hangs.

Rank 1 of a run's first start hangs when it prepares step 5.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_ettin.training import preparation
from tests.ranks import pretrain_main

STEP = 5


def hang(how: str) -> None:
    """Block for longer than any test takes."""
    if how == "sleep":
        time.sleep(10_000)  # the line that hangs
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
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


def pretrain_and_hang(arguments: Sequence[str]) -> None:
    """Run pretrain's command line behind the first argument, which says how to hang."""
    how, *others = arguments
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        preparation.phase_steps = hanging_steps(how)
    pretrain_main(others)
