"""Steps between two reports: what this rank has seen of them, and its sum over all ranks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_ettin import distributed
from megatron_ettin.order.row_losses import trained_entries
from megatron_ettin.training.device_figures import peak_memory_bytes
from megatron_ettin.training.micro_batch import MicroBatch, Report
from megatron_ettin.training.preparation import LANES, Prepared, StepRange
from megatron_ettin.training.stopwatch import Stopwatch


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Sums of an interval over all ranks."""

    loss: float
    """Mean loss per scored token; of masked diffusion, its bound per token."""
    steps: list[StepRange]
    lanes: NDArray[np.uint64]
    """[n, LANES] digest lanes of each of the n steps."""
    flops: float
    """Operations of the model for all documents, without padding and recomputation."""
    peak_memory_bytes: int
    """Largest memory that any rank has needed since the run began."""
    is_written_by_all: bool
    """All ranks have written their part of the pending checkpoint."""
    own_seconds: NDArray[np.float64]
    """[ranks] time of each rank's own part of a step, as the rank has measured it."""
    row_losses: NDArray[np.void] | None
    """[rows of the steps] entries of their losses (`order/row_losses.py`), if they are kept."""

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return sum(step.tokens for step in self.steps)


class Interval:
    """Steps since the last report, as this rank has seen them."""

    def __init__(self, *, keeps_rows: bool = False) -> None:
        """Start an interval; with `keeps_rows` its summary has the loss of each row."""
        self.started = time.perf_counter()
        self.optimizer = Stopwatch()
        self._steps: list[StepRange] = []
        self._lanes: list[NDArray[np.uint64]] = []
        self._flops: list[float] = []
        self._losses = torch.zeros(2, dtype=torch.float64, device=distributed.device())
        # [2, rows + 1] sums and tokens of a step's rows, then a place for idle rows.
        self._rows: list[torch.Tensor] | None = [] if keeps_rows else None

    def begin_step(self, step: StepRange) -> None:
        """Begin a step: micro-batches that are consumed from here on belong to it."""
        self._steps.append(step)
        self._lanes.append(np.zeros(LANES, dtype=np.uint64))
        self._flops.append(0.0)
        if self._rows is not None:
            size = (2, step.g_end - step.g_begin + 1)
            self._rows.append(self._losses.new_zeros(size))

    def drop_step(self) -> None:
        """Forget the step that was begun last: its update is not made, and it has no losses."""
        for of_steps in (self._steps, self._lanes, self._flops):
            of_steps.pop()
        if self._rows is not None:
            self._rows.pop()

    @property
    def has_steps(self) -> bool:
        """Tell whether there is anything to report."""
        return bool(self._steps)

    def consume(self, batches: Iterator[Prepared]) -> Iterator[MicroBatch]:
        """Yield micro-batches, and add each to the step when the model takes it."""
        for batch in batches:
            self._lanes[-1] += batch.lanes
            self._flops[-1] += batch.flops
            yield batch.micro_batch

    def add_losses(self, reports: list[Report]) -> None:
        """Add a step's losses, without waiting for the device; only the last stage has any."""
        for report in reports:
            self._losses[0] += report["loss_sums"].sum()
            self._losses[1] += report["counts"].sum()
        if self._rows is not None and reports:
            rows, first = self._rows[-1], self._steps[-1].g_begin
            g = torch.cat([report["g"] for report in reports])
            # No row comes twice on a rank, so places are written, not added to: in no order.
            places = torch.where(g >= 0, g - first, rows.shape[1] - 1)
            for values, name in zip(rows, ("loss_sums", "counts"), strict=True):
                values[places] = torch.cat([report[name] for report in reports]).double()

    def sum_over_ranks(self, own_seconds: float = 0.0, *, is_written: bool = False) -> Summary:
        """Sum over all ranks; all of them call this and get the same result.

        One all-reduce of float64 carries everything (`_slices` names its parts). A digest lane goes
        as two halves of 32 bits, whose sums over fewer than 2^21 ranks are exact in a double. Each
        rank writes its peak of memory and its own time to places of its own, so the sum leaves
        them as they are.
        """
        lanes = np.array(self._lanes, dtype=np.uint64)  # [steps, LANES]
        own = np.zeros((2, distributed.world_size()))
        own[:, distributed.rank()] = peak_memory_bytes(), own_seconds
        low, high = lanes & np.uint64(0xFFFFFFFF), lanes >> np.uint64(32)
        once = [sum(self._flops), is_written]
        sent = np.concatenate([once, low.ravel(), high.ravel(), own.ravel()], dtype=np.float64)
        # Losses stay on the device until here; this copies the rest to them, and the sum back.
        of_rows = [rows[:, :-1] for rows in self._rows or []]
        losses = torch.cat(
            [self._losses, *(part for rows in zip(*of_rows, strict=True) for part in rows)]
        )
        if not distributed.counts_losses():
            losses = torch.zeros_like(losses)
        vector = torch.cat([losses, torch.from_numpy(sent).to(losses.device)])
        received = distributed.all_reduce_sum(vector).cpu().numpy()
        num_rows = (len(losses) - 2) // 2
        sizes = {"flops": 1, "written": 1, "low": lanes.size, "high": lanes.size}
        sizes |= {"peak": own.shape[1], "seconds": own.shape[1]}
        at = _slices({"loss": 2, "row_sums": num_rows, "row_tokens": num_rows, **sizes})
        loss_sum, num_scored = received[at["loss"]]
        low, high = (received[at[half]].astype(np.uint64) for half in ("low", "high"))
        return Summary(
            loss=float(loss_sum / num_scored),
            steps=self._steps,
            lanes=(low + (high << np.uint64(32))).reshape(lanes.shape),
            flops=float(received[at["flops"]].item()),
            peak_memory_bytes=int(received[at["peak"]].max()),
            is_written_by_all=received[at["written"]].item() == distributed.world_size(),
            own_seconds=received[at["seconds"]],
            row_losses=None
            if self._rows is None
            else trained_entries(received[at["row_sums"]], received[at["row_tokens"]]),
        )


def _slices(sizes: dict[str, int]) -> dict[str, slice]:
    """Return the slice of each part, by name, in a vector that holds parts of `sizes` in turn."""
    ends = itertools.accumulate(sizes.values())
    return {
        name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)
    }
