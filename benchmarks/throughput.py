"""Tokens per second of ways to train one model, measured side by side in one process.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import torch

from benchmarks.contenders import Contender, Step
from benchmarks.device import wait_for_device

Builder = Callable[[int], Contender]
"""Makes a contender whose micro-batches have at most so many slots."""
Each = Callable[[str, "Measurement"], None]
"""Takes the name of what has been measured, and the measurement."""
SMALLEST_SLOTS = 1024
"""Slots of the smallest micro-batch: one row."""


@dataclass(kw_only=True)
class Measurement:
    """The timed steps of one contender."""

    micro_batch_slots: int
    peak_memory_bytes: int | None = None
    """Peak memory of a GPU, where contenders run one after the other; None on a CPU."""
    steps: list[Step] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Median over the steps of tokens learned from per second."""
        return statistics.median(self._rates())

    @property
    def spread(self) -> tuple[float, float]:
        """The slowest and the fastest step, tokens per second."""
        return min(self._rates()), max(self._rates())

    @property
    def fill(self) -> float:
        """The share of the slots that were not padding."""
        return sum(step.tokens for step in self.steps) / sum(step.slots for step in self.steps)

    @property
    def flops_per_s(self) -> float | None:
        """Median of the operations that the model needed per second, where they are known."""
        rates = [
            step.flops / seconds
            for step, seconds in zip(self.steps, self.seconds, strict=True)
            if step.flops is not None
        ]
        return statistics.median(rates) if rates else None

    def _rates(self) -> list[float]:
        return [
            step.tokens / seconds for step, seconds in zip(self.steps, self.seconds, strict=True)
        ]

    def time(self, take_step: Callable[[], Step]) -> None:
        """Add a step, from an idle device to an idle device."""
        wait_for_device()
        begin = time.perf_counter()
        step = take_step()
        wait_for_device()
        self.seconds.append(time.perf_counter() - begin)
        self.steps.append(step)


def side_by_side(
    builders: Mapping[str, Builder],
    *,
    micro_batch_slots: int,
    rounds: int,
    warm_up_steps: int = 1,
    at_end: Callable[[Contender], None] = lambda _: None,
    each: Each = lambda _, __: None,
) -> dict[str, Measurement]:
    """Measure contenders in turns, a step each, so that a busy machine slows all of them alike.

    `warm_up_steps` are not timed: they compile kernels, pick algorithms, fill the allocator and
    capture graphs. `at_end` gets each contender once it has been measured, and `each` its name and
    measurement: here, when all have been.
    """
    measured = {name: Measurement(micro_batch_slots=micro_batch_slots) for name in builders}
    with ExitStack() as opened:
        contenders = {
            name: opened.enter_context(closing(build(micro_batch_slots)))
            for name, build in builders.items()
        }
        for contender in contenders.values():
            for _ in range(warm_up_steps):
                contender.step()
        for _ in range(rounds):
            for name, contender in contenders.items():
                measured[name].time(contender.step)
        for name, contender in contenders.items():
            each(name, measured[name])
            at_end(contender)
    return measured


def one_by_one(
    builders: Mapping[str, Builder],
    *,
    micro_batch_slots: int,
    rounds: int,
    warm_up_steps: int = 1,
    at_end: Callable[[Contender], None] = lambda _: None,
    each: Each = lambda _, __: None,
) -> dict[str, Measurement]:
    """Measure contenders one after the other, each alone on the device and its memory.

    Each is built once and measured in all its variants. A contender that does not fit runs with
    half the slots in a micro-batch, and so on. `each` gets a variant's name and measurement before
    the next variant begins.
    """
    measured = {}
    for name, build in builders.items():
        slots, contender = _largest_that_fits(build, micro_batch_slots, warm_up_steps)
        with closing(contender):
            for suffix, take_step in contender.variants().items():
                measurement = Measurement(micro_batch_slots=slots)
                take_step()  # a variant's first step prepares what it keeps
                for _ in range(rounds):
                    measurement.time(take_step)
                measurement.peak_memory_bytes = int(torch.cuda.max_memory_allocated())
                measured[name + suffix] = measurement
                each(name + suffix, measurement)
            at_end(contender)
        # Both names must go before the memory can.
        del contender, take_step
        _free()
    return measured


def _largest_that_fits(build: Builder, slots: int, warm_up_steps: int) -> tuple[int, Contender]:
    """Build with `slots`, halved until the first steps run; take those steps."""
    while True:
        # The peak is that of the attempt that fits, building included.
        torch.cuda.reset_peak_memory_stats()
        contender: Contender | None = None
        try:
            contender = build(slots)
            for _ in range(warm_up_steps):
                contender.step()
            wait_for_device()
            return slots, contender
        except BaseException as error:
            if contender is not None:
                contender.close()
            if not isinstance(error, torch.OutOfMemoryError) or slots // 2 < SMALLEST_SLOTS:
                raise
        # The name must go before the memory can; half the slots may then fit.
        del contender
        _free()
        slots //= 2


def _free() -> None:
    """Give back what the GPU holds for contenders that nothing refers to."""
    gc.collect()
    torch.cuda.empty_cache()
