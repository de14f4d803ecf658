"""What a rank has seen since the last report, and its sum over all ranks in one all-reduce."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_ettin import distributed
from megatron_ettin.training.memory import peak_memory_bytes
from megatron_ettin.training.micro_batch import MicroBatch
from megatron_ettin.training.preparation import LANES, Prepared, StepRange


@dataclass(frozen=True, kw_only=True)
class Summary:
    """An interval over all ranks."""

    loss: float
    """Mean loss per scored token."""
    steps: list[StepRange]
    lanes: NDArray[np.uint64]
    """[n, 5]: digest lanes of each step."""
    flops: float
    """Operations of the model that all documents took, without padding and recomputation."""
    peak_memory_bytes: int
    """Largest memory of a rank since the run began, over the ranks."""

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return sum(step.tokens for step in self.steps)


class Stopwatch:
    """Seconds that the device spends inside `measure` blocks, without waiting for it until read."""

    def __init__(self) -> None:
        """Start at zero."""
        self._times: list[tuple[Any, Any]] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Add the time of the block."""
        begin = _moment()
        yield
        self._times.append((begin, _moment()))

    def seconds(self) -> float:
        """Return the sum; on a GPU, wait for the last block to end."""
        if not torch.cuda.is_available():
            return sum(end - begin for begin, end in self._times)
        for _, end in self._times[-1:]:
            end.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._times) / 1000.0


def _moment() -> Any:
    """Return the time now: as an event of the GPU's own queue of work if there is one."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class Interval:
    """The steps since the last report."""

    def __init__(self) -> None:
        """Start an interval."""
        self.started = time.perf_counter()
        self.optimizer = Stopwatch()
        self._steps: list[StepRange] = []
        self._lanes: list[NDArray[np.uint64]] = []
        self._flops = 0.0
        self._losses = torch.zeros(2, dtype=torch.float64, device=distributed.device())

    def begin(self, step: StepRange) -> None:
        """Begin a step: what is consumed from here on belongs to it."""
        self._steps.append(step)
        self._lanes.append(np.zeros(LANES, dtype=np.uint64))

    def consume(self, batches: Iterator[Prepared]) -> Iterator[MicroBatch]:
        """Yield micro-batches, adding each to the step as it is handed to the model."""
        for batch in batches:
            self._lanes[-1] += batch.lanes
            self._flops += batch.flops
            yield batch.micro_batch

    def add(self, reports: list[dict[str, torch.Tensor]]) -> None:
        """Add a step's losses (none but on the last stage) without waiting for the device."""
        for report in reports:
            self._losses[0] += report["loss_sums"].sum()
            self._losses[1] += report["counts"].sum()

    def summed(self) -> Summary:
        """Sum over all ranks; all of them call this and get the same result.

        The digests ride the all-reduce of the losses: a lane is sent as two halves of 32 bits,
        whose sums over fewer than 2^21 ranks are exact in a double. So do the operations, and the
        peaks of memory, each in the place of its rank.
        """
        lanes = np.array(self._lanes, dtype=np.uint64)
        halves = np.stack([lanes & np.uint64(0xFFFFFFFF), lanes >> np.uint64(32)])
        losses = self._losses if distributed.counts_losses() else torch.zeros_like(self._losses)
        peaks = np.zeros(distributed.world_size())
        peaks[distributed.rank()] = peak_memory_bytes()
        sent = np.concatenate([[self._flops], halves.astype(np.float64).ravel(), peaks])
        together = torch.cat([losses, torch.from_numpy(sent).to(losses.device)])
        received = distributed.all_reduce_sum(together).cpu().numpy()
        low, high = received[3 : -len(peaks)].reshape(2, *lanes.shape).astype(np.uint64)
        return Summary(
            loss=float(received[0] / received[1]),
            steps=self._steps,
            lanes=low + (high << np.uint64(32)),
            flops=float(received[2]),
            peak_memory_bytes=int(received[-len(peaks) :].max()),
        )
