"""Tokens per second: FLOPs per token over (peak of the device x the share of it that is reached).

The share is what the published Ettin runs reached, by size; a measured rate replaces all of this.
Communication between devices is not modelled, a pipeline's idle stages are.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence

from megatron_ettin.config import HardwareConfig, ModelConfig, PhaseConfig
from megatron_ettin.devices import GPUS, Device
from megatron_ettin.model.counts import Attention, flops_per_token, parameters

#: Hours that 2 T tokens took on 4 H100, by size (Ettin's pretraining/README.md; it does not say of
#: which twin): (layers, hidden size, MLP size, heads, hours).
PUBLISHED_HOURS = (
    (7, 256, 384, 4, 141.0),
    (10, 384, 576, 6, 212.0),
    (19, 512, 768, 8, 300.0),
    (22, 768, 1152, 12, 470.0),
    (28, 1024, 2624, 16, 950.0),
    (28, 1792, 3840, 28, 2170.0),
)
PUBLISHED_DEVICES = 4
#: Ettin's three phases (examples/phase).
PUBLISHED_PHASES = (
    PhaseConfig(
        name="pretrain", train_tokens=1_700_000_000_000, seq_length=1024, global_batch_size=2770
    ),
    PhaseConfig(
        name="extension",
        train_tokens=250_000_000_000,
        seq_length=8192,
        global_batch_size=346,
        lr_end=0.5,
        rotary_base_global=160_000,
        rotary_base_local=160_000,
    ),
    PhaseConfig(
        name="decay",
        train_tokens=50_000_000_000,
        seq_length=8192,
        global_batch_size=346,
        lr_start=0.5,
        lr_end=0.02,
        rotary_base_global=160_000,
        rotary_base_local=160_000,
    ),
)
#: The share of its positions that the published encoders scored (0.15 in the last phase).
PUBLISHED_SCORED_SHARE = 0.3
#: Parameters, and the share of the matrix peak that training reached with them on CPU
#: (docs/estimate.md).
CPU_UTILIZATION = ((1_631_488, 0.27), (16_913_600, 0.38), (68_457_664, 0.56))


def published_utilization() -> list[tuple[float, float]]:
    """Return (log of the parameters, share of the peak reached) of each published size.

    The hours are taken as an encoder's: a decoder scores more positions in the same time.
    """
    points = []
    for layers, hidden, mlp, heads, hours in PUBLISHED_HOURS:
        model = ModelConfig(
            num_layers=layers, hidden_size=hidden, ffn_hidden_size=mlp, num_attention_heads=heads
        )
        work = sum(
            phase.train_tokens
            * flops_per_token(
                model, "bidirectional", phase.seq_length, PUBLISHED_SCORED_SHARE
            ).model
            for phase in PUBLISHED_PHASES
        )
        available = hours * 3600 * PUBLISHED_DEVICES * GPUS["h100"].peak_flops["bf16"]
        points.append((math.log(parameters(model).total), work / available))
    return points


def utilization(model: ModelConfig, device: Device) -> float:
    """Return the share of the device's peak that training such a model reaches, as a guess.

    Between the known sizes it is interpolated in the logarithm of the parameters; beyond them it
    stays what the smallest or largest reached.
    """
    if device.kind == "cpu":
        points = [(math.log(count), share) for count, share in CPU_UTILIZATION]
    else:
        points = published_utilization()
    size = math.log(parameters(model).total)
    for (low, at_low), (high, at_high) in itertools.pairwise(points):
        if size <= high:
            share = max(0.0, (size - low) / (high - low))
            return at_low + share * (at_high - at_low)
    return points[-1][1]


def tokens_per_second(
    model: ModelConfig,
    attention: Attention,
    hardware: HardwareConfig,
    device: Device,
    *,
    world_size: int,
    seq_length: int,
    scored_share: float,
    fill: float,
    micro_batches: int,
) -> float:
    """Return the tokens per second of the whole world in a phase."""
    flops = flops_per_token(model, attention, seq_length, scored_share)
    work = flops.model + (flops.recompute if hardware.recomputes_layers else 0.0)
    peak = device.peak_flops[hardware.parameter_precision] * _devices(hardware, device, world_size)
    stages = hardware.pipeline_parallel_size
    busy = micro_batches / (micro_batches + stages - 1)
    return fill * peak * utilization(model, device) * busy / work


def _devices(hardware: HardwareConfig, device: Device, world_size: int) -> float:
    """Return how many devices work; on a CPU, the share of the cores that the threads use."""
    if device.kind == "cuda":
        return world_size
    cores = os.cpu_count() or 1
    return min(1.0, world_size * (hardware.threads_per_rank or cores) / cores)


def average(rates: Sequence[float], tokens: Sequence[float]) -> float:
    """Return the rate over parts of `tokens` (or of these shares) at `rates`."""
    return sum(tokens) / sum(count / rate for count, rate in zip(tokens, rates, strict=True))
