"""The estimate of a run: does it fit, how long does it take, what does it leave on disk."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megatron_ettin.config import HardwareConfig, PhaseConfig, RunConfig
from megatron_ettin.data.step_occupancy import (
    StepOccupancy,
    advise,
    fuller_micro_batch,
    step_occupancy,
)
from megatron_ettin.devices import GIB, Device
from megatron_ettin.estimate.memory import Work, largest_rank
from megatron_ettin.estimate.throughput import average, tokens_per_second
from megatron_ettin.model.counts import Parameters, parameters
from megatron_ettin.objectives import attentions

#: Largest micro-batch that is tried where the configuration names none.
LARGEST_MICRO_BATCH_TOKENS = 65_536
#: Share of a device's memory that such a micro-batch may fill.
COMFORTABLE_SHARE = 0.9


class EstimateError(ValueError):
    """The run cannot fit or cannot be laid out; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class PhaseEstimate:
    """One phase."""

    name: str
    tokens: int
    steps: int
    occupancy: StepOccupancy
    """Places of a full step, and how many of them are filled."""
    tokens_per_s: float
    hours: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory, time, steps and disk of a run."""

    parameters: Parameters
    hardware: HardwareConfig
    device: Device
    num_devices: int
    memory_bytes: dict[str, int]
    """Bytes by part, on the rank that needs most, in its most demanding phase."""
    phases: list[PhaseEstimate]
    advice: list[tuple[str, str]]
    """Settings that lose less time, as (phase, text) or, for the whole run, ("", text)."""
    checkpoints: int
    checkpoint_bytes: int

    @property
    def total_memory_bytes(self) -> int:
        """Peak of that rank."""
        return sum(self.memory_bytes.values())

    @property
    def tokens(self) -> int:
        """Tokens of all phases."""
        return sum(phase.tokens for phase in self.phases)

    @property
    def hours(self) -> float:
        """Hours of all phases."""
        return sum(phase.hours for phase in self.phases)

    @property
    def device_hours(self) -> float:
        """Hours of all phases, times the devices."""
        return self.hours * self.num_devices

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of the whole world, over all phases."""
        return average([p.tokens_per_s for p in self.phases], [p.tokens for p in self.phases])


def estimate(
    config: RunConfig,
    device: Device,
    *,
    num_devices: int,
    fill: float,
    tokens_per_s: float | None = None,
    choose_micro_batch: bool = False,
) -> Estimate:
    """Estimate a run on `num_devices` devices, of which each is one rank.

    Args:
        config: the run.
        device: what each rank has; a CPU is shared by all of them.
        num_devices: ranks.
        fill: share of the slots that hold tokens.
        tokens_per_s: a measured rate of the whole world, in place of the estimated one.
        choose_micro_batch: take the largest micro-batch that fits, or a smaller one that loses less
            time to empty places, instead of the configuration's.

    Raises:
        EstimateError: the run cannot be laid out over the ranks, or does not fit.
    """
    if num_devices % config.hardware.model_ranks:
        raise EstimateError(
            f"{num_devices} devices cannot be laid out: one replica of the model takes "
            f"{config.hardware.model_ranks} (tensor x pipeline x context parallel)"
        )
    if choose_micro_batch:
        config = _with_largest_micro_batch(config, device, num_devices)
    memory = run_memory(config, device, num_devices)
    _check_fits(config, device, num_devices, memory)
    phases = [
        _phase(config, phase, device, num_devices, fill, tokens_per_s) for phase in config.phases
    ]
    return Estimate(
        parameters=parameters(config.model),
        hardware=config.hardware,
        device=device,
        num_devices=num_devices,
        memory_bytes=memory,
        phases=phases,
        advice=advise(config.phases, config.hardware, num_devices),
        checkpoints=num_checkpoints(config, [phase.tokens for phase in phases]),
        checkpoint_bytes=checkpoint_bytes(config),
    )


def run_memory(config: RunConfig, device: Device, num_devices: int) -> dict[str, int]:
    """Return the memory by part of the largest rank in the phase that needs most."""
    works = [_work(config, phase, device, num_devices) for phase in config.phases]
    return max((largest_rank(work) for work in works), key=lambda parts: sum(parts.values()))


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the size of a checkpoint: the weights, and in fp32 masters and moments."""
    model = config.model
    padding = (model.padded_vocab_size - model.vocab_size) * (model.hidden_size + 1)
    count = parameters(model).total + padding
    weight = 4 if config.hardware.parameter_precision == "fp32" else 2
    return count * (weight + 4 * (1 + config.optimizer.num_moments))


def num_checkpoints(config: RunConfig, phase_tokens: list[int]) -> int:
    """Count the checkpoints: each time the cadence is crossed, and at the end of each phase.

    With `checkpoint.keep`, return the most that it leaves.
    """
    every = config.checkpoint.save_every_tokens
    consumed = 0
    saved = 0
    for tokens in phase_tokens:
        before, consumed = consumed, consumed + tokens
        if every is None:
            saved += 1
        else:
            saved += consumed // every - before // every + bool(consumed % every)
    keep = config.checkpoint.keep
    if keep.keeps_all:
        return saved
    multiples = consumed // keep.every_tokens if keep.every_tokens is not None else 0
    return min(saved, len(phase_tokens) + (keep.last or 1) + multiples)


def _work(config: RunConfig, phase: PhaseConfig, device: Device, num_devices: int) -> Work:
    hardware = config.hardware
    slots = hardware.micro_batch_rows(phase.seq_length) * phase.seq_length
    share = config.objective.largest_scored_share(phase.name)
    directions = attentions(config.objective, [phase.name])
    return Work(
        model=config.model,
        # Where a micro-batch may have rows of both kinds: the one that needs more memory.
        attention="bidirectional" if "bidirectional" in directions else "causal",
        hardware=hardware,
        world_size=num_devices,
        slots=slots,
        scored=math.ceil(share * slots),
        micro_batches=step_occupancy(phase, hardware, num_devices).micro_batches,
        moments=config.optimizer.num_moments,
        device=device,
    )


def _phase(
    config: RunConfig,
    phase: PhaseConfig,
    device: Device,
    num_devices: int,
    fill: float,
    measured: float | None,
) -> PhaseEstimate:
    tokens = phase.train_tokens
    if phase.train_rows is not None:
        tokens = min(tokens, int(phase.train_rows * phase.seq_length * fill))
    occupancy = step_occupancy(phase, config.hardware, num_devices)
    shares = config.objective.for_phase(phase.name).row_shares()
    rates = [
        tokens_per_second(
            config.model,
            objective.attention,
            config.hardware,
            device,
            world_size=num_devices,
            seq_length=phase.seq_length,
            scored_share=objective.scored_share(phase.name),
            fill=fill * (1.0 - occupancy.lost_share),
            micro_batches=occupancy.micro_batches,
        )
        for objective, _ in shares
    ]
    rate = measured or average(rates, [share for _, share in shares])
    return PhaseEstimate(
        name=phase.name,
        tokens=tokens,
        steps=num_steps(phase, tokens, fill),
        occupancy=occupancy,
        tokens_per_s=rate,
        hours=tokens / rate / 3600,
    )


def num_steps(phase: PhaseConfig, tokens: int, fill: float) -> int:
    """Return the steps that a phase of `tokens` takes if its rows are filled to `fill`."""
    row = phase.seq_length * fill
    steps, consumed = 0, 0.0
    while consumed < min(tokens, phase.batch_ramp_tokens or 0):
        consumed += phase.batch_rows(int(consumed)) * row
        steps += 1
    return steps + max(0, math.ceil((tokens - consumed) / (phase.global_batch_size * row)))


def _with_largest_micro_batch(config: RunConfig, device: Device, num_devices: int) -> RunConfig:
    """Return `config` with the micro-batch to take where none is given.

    The largest power of two that leaves some memory free, or a smaller one that loses less time.
    """
    longest = max(phase.seq_length for phase in config.phases)
    slots = max(LARGEST_MICRO_BATCH_TOKENS, longest)
    while True:
        hardware = dataclasses.replace(config.hardware, micro_batch_tokens=slots)
        config = dataclasses.replace(config, hardware=hardware)
        needed = sum(run_memory(config, device, num_devices).values())
        if needed <= COMFORTABLE_SHARE * _memory(device, num_devices) or slots == longest:
            fuller = fuller_micro_batch(config.phases, hardware, num_devices)
            return dataclasses.replace(config, hardware=fuller or hardware)
        slots = max(slots // 2, longest)


def _memory(device: Device, num_devices: int) -> float:
    """Return the memory that a rank can have."""
    return device.memory_bytes / (num_devices if device.kind == "cpu" else 1)


def _check_fits(
    config: RunConfig, device: Device, num_devices: int, memory: dict[str, int]
) -> None:
    needed, available = sum(memory.values()), _memory(device, num_devices)
    if needed <= available:
        return
    part = max(memory, key=lambda name: memory[name])
    raise EstimateError(
        f"does not fit: a rank needs {needed / GIB:.1f} GiB, most of it for {part} "
        f"({memory[part] / GIB:.1f} GiB), and has {available / GIB:.1f} GiB of {device.name}: "
        f"lower hardware.micro_batch_tokens ({config.hardware.micro_batch_tokens}), set "
        f"hardware.recompute full, or share the model among more devices"
    )
