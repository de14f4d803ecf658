"""Time that each rank needs for its own part of a step, by which a slow rank shows."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from megatron.core.distributed import finalize_model_grads
from numpy.typing import NDArray

from megatron_ettin import distributed
from megatron_ettin.training.stopwatch import Stopwatch


class RankTimes:
    """Clock of this rank: from the end of a step to the reduction of the next step's gradients.

    That is the wait for data, forward and backward. The ranks begin together, because they agree
    after each step whether to stop. The reduction, where a rank waits for slower ones, is left out.
    Within a replica of several ranks the passes themselves wait for each other: a slow rank slows
    its whole replica, and only replicas can be told apart. On a GPU its own clock counts.
    """

    def __init__(self) -> None:
        """Exchange the names of the hosts. All ranks call this."""
        self._hosts = distributed.all_gather(platform.node())
        self._steps = Stopwatch()

    def begin(self) -> None:
        """Begin a step, before its data is asked for."""
        self._steps.begin()

    def finalize(self, *arguments: Any, **named: Any) -> None:
        """End the step's time, then call Megatron-Core's `finalize_model_grads`."""
        self._steps.end()
        finalize_model_grads(*arguments, **named)

    def take_mean(self) -> float:
        """Return the mean in seconds of the steps since the last call; wait for the last one."""
        mean = self._steps.mean_seconds()
        self._steps = Stopwatch()
        return mean

    def describe(self, seconds: NDArray[np.float64]) -> dict[str, float | int | str]:
        """Return the fields of a line of metrics.jsonl for the means [ranks] of all ranks."""
        slowest = int(seconds.argmax())
        return {
            "rank_seconds_min": float(seconds.min()),
            "rank_seconds_median": float(np.median(seconds)),
            "rank_seconds_max": float(seconds.max()),
            "slowest_rank": slowest,
            "slowest_host": self._hosts[slowest],
        }
