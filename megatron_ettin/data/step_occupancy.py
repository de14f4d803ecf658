"""Occupancy of a step: micro-batches of a rank, idle ranks, lost time, settings that lose less.

Every rank runs as many micro-batches as the busiest one. Where rows are missing it computes
padding, which takes as long. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ettin.config import HardwareConfig, PhaseConfig

#: Share of the time that a run may lose before other settings are suggested.
TOLERATED_LOSS = 0.02
#: Smallest share of the time for which a smaller micro-batch is taken: its matmuls are smaller too.
WORTHWHILE_GAIN = 0.005


@dataclass(frozen=True, kw_only=True)
class StepOccupancy:
    """Places of rows in a full step of a phase, and how many of them have a row."""

    batch_rows: int
    """Rows of the step."""
    micro_batch_rows: int
    """Rows that a micro-batch has places for."""
    data_parallel_size: int
    model_ranks: int
    """Ranks of one replica of the model."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches that each rank runs."""
        return -(-self.batch_rows // (self.micro_batch_rows * self.data_parallel_size))

    @property
    def idle_ranks(self) -> int:
        """Ranks without a row in the last micro-batch; with one micro-batch, in the whole step."""
        used = -(-self.batch_rows // self.micro_batch_rows)
        replicas = self.micro_batches * self.data_parallel_size - used
        return replicas * self.model_ranks

    @property
    def lost_share(self) -> float:
        """Share of a step's time that goes into places without a row."""
        places = self.micro_batches * self.micro_batch_rows * self.data_parallel_size
        return 1.0 - self.batch_rows / places

    @property
    def even_batches(self) -> list[int]:
        """Nearest batch sizes that leave no place empty, in rows."""
        unit = self.micro_batch_rows * self.data_parallel_size
        sizes = (self.batch_rows // unit * unit, -(-self.batch_rows // unit) * unit)
        return [size for size in sizes if size]

    def __str__(self) -> str:
        """Say it in a line."""
        rows = f"{self.micro_batch_rows} row{'s' if self.micro_batch_rows > 1 else ''}"
        many = "es" if self.micro_batches > 1 else ""
        text = f"{self.micro_batches:,} micro-batch{many} of {rows} a rank"
        if not self.lost_share:
            return f"{text}, no rank idle"
        ranks = self.data_parallel_size * self.model_ranks
        last = " in the last" if self.micro_batches > 1 else ""
        idle = (
            f"{self.idle_ranks:,} of {ranks:,} ranks idle{last}"
            if self.idle_ranks
            else "rows missing in the last"
        )
        return f"{text}, {idle}: {self.lost_share:.1%} of the time lost"


def step_occupancy(phase: PhaseConfig, hardware: HardwareConfig, num_ranks: int) -> StepOccupancy:
    """Return the occupancy of a full step of `phase`; a batch that still grows fills less."""
    return StepOccupancy(
        batch_rows=phase.global_batch_size,
        micro_batch_rows=hardware.micro_batch_rows(phase.seq_length),
        data_parallel_size=num_ranks // hardware.model_ranks,
        model_ranks=hardware.model_ranks,
    )


def lost_share(phases: Sequence[PhaseConfig], hardware: HardwareConfig, num_ranks: int) -> float:
    """Return the share of a run's time that is lost, if all tokens take the same time."""
    tokens = sum(phase.train_tokens for phase in phases)
    time = sum(
        phase.train_tokens / (1.0 - step_occupancy(phase, hardware, num_ranks).lost_share)
        for phase in phases
    )
    return 1.0 - tokens / time


def fuller_micro_batch(
    phases: Sequence[PhaseConfig], hardware: HardwareConfig, num_ranks: int
) -> HardwareConfig | None:
    """Return `hardware` with a smaller micro-batch that loses less time; None if none gains.

    A further step down must gain `WORTHWHILE_GAIN`. The micro-batch stays at least half as large,
    unless ranks are idle for whole steps: then the rows are spread over more of them.
    """
    kept = hardware
    least = lost_share(phases, hardware, num_ranks)
    for slots in sorted(_smaller_micro_batches(phases, hardware, num_ranks), reverse=True):
        other = dataclasses.replace(hardware, micro_batch_tokens=slots)
        try:
            lost = lost_share(phases, other, num_ranks)
        except ValueError:  # ranks that share the slots cannot share these evenly
            continue
        if lost < least - WORTHWHILE_GAIN:
            kept, least = other, lost
    return None if kept is hardware else kept


def _smaller_micro_batches(
    phases: Sequence[PhaseConfig], hardware: HardwareConfig, num_ranks: int
) -> set[int]:
    """Return slots that hold whole rows of a phase, and a row of each phase."""
    longest = max(phase.seq_length for phase in phases)
    found = set()
    for phase in phases:
        step = step_occupancy(phase, hardware, num_ranks)
        smallest = -(-step.micro_batch_rows // 2)
        if step.micro_batches == 1:
            smallest = min(smallest, -(-step.batch_rows // step.data_parallel_size))
        rows = range(smallest, step.micro_batch_rows)
        found |= {max(count * phase.seq_length, longest) for count in rows}
    return {slots for slots in found if slots < hardware.micro_batch_tokens}


def advise(
    phases: Sequence[PhaseConfig], hardware: HardwareConfig, num_ranks: int
) -> list[tuple[str, str]]:
    """Return what would lose less time: (phase, a batch size) or ("", another setting of the run).

    Nothing, if no phase loses more than `TOLERATED_LOSS`.
    """
    advice = []
    busy = 0
    for phase in phases:
        step = step_occupancy(phase, hardware, num_ranks)
        busy = max(busy, -(-step.batch_rows // step.micro_batch_rows) * step.model_ranks)
        if step.lost_share > TOLERATED_LOSS:
            sizes = " or ".join(f"{size:,}" for size in step.even_batches)
            advice.append((phase.name, f"global_batch_size {sizes} leaves no rank idle"))
    if not advice:
        return []
    better = fuller_micro_batch(phases, hardware, num_ranks)
    if better is not None:
        lost = lost_share(phases, better, num_ranks)
        slots = better.micro_batch_tokens
        advice.append(("", f"hardware.micro_batch_tokens {slots} loses {lost:.1%} of the run"))
    if busy < num_ranks:
        advice.append(("", f"{busy:,} ranks with these micro-batches take as long"))
    return advice
