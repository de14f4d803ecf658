"""Batch sizes of a run of Megatron-LM: which rows each of its iterations takes."""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Sequence

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def ramp_up(global_batch_size: int, ramp: Sequence[int]) -> BatchSchedule:
    """Return the schedule of `--rampup-batch-size` (first batch size, increment, samples).

    Source: RampupBatchsizeNumMicroBatchesCalculator of megatron-core 0.16.1, without
    `--decrease-batch-size-if-needed`.

    Raises:
        ValueError: Megatron refuses such a ramp, too.
    """
    if len(ramp) != 3:
        raise ValueError(
            f"rampup_batch_size: expected [first batch size, increment, samples], found {ramp}"
        )
    first, increment, samples = ramp
    increments, rest = divmod(global_batch_size - first, increment)
    if rest or increments < 1:
        raise ValueError(
            f"rampup_batch_size: from {first} by {increment} does not lead up to the global batch "
            f"size {global_batch_size}"
        )
    # Megatron divides in floats, and the rounding decides where the size changes. So do we.
    per_increment = samples / increments
    sizes = [(0, first)]
    for level in range(1, increments + 1):
        rows = math.ceil(per_increment * level)
        while int(rows / per_increment) >= level:
            rows -= 1
        while int(rows / per_increment) < level:
            rows += 1
        sizes.append((rows, first + level * increment))
    # Beyond `samples` Megatron no longer divides: the ramp is over.
    sizes[-1] = (min(sizes[-1][0], samples + 1), global_batch_size)
    return BatchSchedule(sizes)


def parse_step_sizes(text: str, seq_length: int) -> BatchSchedule:
    """Return the schedule of `--step-batch-size-schedule`, such as "0:768 250B:1536" in tokens.

    Source: StepBatchsizeNumMicroBatchesCalculator of megatron-core 0.19.2.

    Raises:
        ValueError: the text does not begin at 0, or does not ascend.
    """
    sizes = []
    for entry in text.replace(",", " ").split():
        parts = re.fullmatch(r"([\d.]+)([KMBT]?):([\d.]+)([KMBT]?)", entry.upper())
        if parts is None:
            raise ValueError(f"step_batch_size_schedule: {entry!r} is not TOKENS:BATCH_SIZE")
        tokens, size = (int(float(parts[i]) * _UNITS[parts[i + 1]]) for i in (1, 3))
        sizes.append((tokens // seq_length, size))
    sizes.sort()
    ascend = all(a < b for (a, _), (b, _) in itertools.pairwise(sizes))
    if not sizes or sizes[0][0] or not ascend or min(size for _, size in sizes) < 1:
        raise ValueError(
            f"step_batch_size_schedule: {text!r} must begin at 0 and ascend, with sizes >= 1"
        )
    return BatchSchedule(sizes)


class BatchSchedule:
    """Rows of each iteration, counted from 1, under a batch size that grows."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Take (rows consumed, batch size from then on) with rows ascending from 0."""
        # One entry per batch size: the steps and the rows before its first use, and the size.
        self._steps, self._rows, self._sizes = [0], [0], [sizes[0][1]]
        for threshold, size in sizes[1:]:
            # The size changes at the first step that begins at the threshold or beyond it.
            steps = max(0, -(-(threshold - self._rows[-1]) // self._sizes[-1]))
            self._steps.append(self._steps[-1] + steps)
            self._rows.append(self._rows[-1] + steps * self._sizes[-1])
            self._sizes.append(size)

    def rows_of_step(self, step: int) -> tuple[int, int]:
        """Return the rows [begin, end) of iteration `step` >= 1."""
        if step < 1:
            raise ValueError(f"step {step}: iterations count from 1")
        level = bisect_right(self._steps, step - 1) - 1
        begin = self._rows[level] + (step - 1 - self._steps[level]) * self._sizes[level]
        return begin, begin + self._sizes[level]

    def step_of_row(self, g: int) -> int:
        """Return the iteration, from 1, that holds row `g` >= 0."""
        if g < 0:
            raise ValueError(f"row {g}: rows count from 0")
        level = bisect_right(self._rows, g) - 1
        return self._steps[level] + (g - self._rows[level]) // self._sizes[level] + 1
