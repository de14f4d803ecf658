"""Times of the attention kernels of global and local layers, forward and backward.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from numpy.typing import NDArray

from benchmarks.device import wait_for_device
from benchmarks.model_sizes import model_of_size
from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig, ModelConfig
from megatron_ettin.config.data import SLOTS_PER_SEGMENT
from megatron_ettin.model.attention import CoreAttention, PackedRows, SdpaCoreAttention
from megatron_ettin.model.attention_gpu import TransformerEngineCoreAttention, VarlenCoreAttention
from megatron_ettin.model.backend import transformer_engine_lack
from megatron_ettin.model.provider import ATTENTION_MASKS, Attention, transformer_config
from megatron_ettin.text_table import text_table
from megatron_ettin.training.attention_choice import attention_passes, serves
from megatron_ettin.training.layer_times import median_seconds
from megatron_ettin.training.micro_batch import segment_boundaries

#: Kinds of three consecutive layers: every third is global (ModelConfig.global_attention_every).
LAYERS = ("global", "local", "local")
WARM_UP = 3
#: Slots of a micro-batch by device, unless others are asked for.
SLOTS = {"cpu": 4096, "cuda": 2**16}

Step = Callable[[], None]
Times = dict[str, float]
"""Milliseconds by what took them."""


def times_of_models(
    sizes: Iterable[str], cu_seqlens: NDArray[np.int32], *, rounds: int
) -> Iterator[tuple[str, Attention, dict[str, Times]]]:
    """Measure the attention of models of examples/model/ with each mask; yield times by kernel."""
    with distributed.process_groups(HardwareConfig()):
        for size, attention in itertools.product(sizes, ATTENTION_MASKS):
            model = model_of_size(size)
            yield size, attention, attention_times(model, attention, cu_seqlens, rounds=rounds)


def attention_times(
    model: ModelConfig,
    attention: Attention,
    cu_seqlens: NDArray[np.int32],
    *,
    rounds: int,
    with_empty: bool = True,
) -> dict[str, Times]:
    """Measure the attention of a model's layers by kernel; needs process groups.

    Args:
        model: whose heads and window are taken.
        attention: the mask.
        cu_seqlens: borders [n + 1] of the segments of whole rows, empty ones included; kernels are
            measured without these.
        rounds: timed passes.
        with_empty: also measure them with these. Transformer Engine's is not: with thousands of
            empty segments a pass takes seconds.
    """
    streams = {"": segment_boundaries(cu_seqlens)}
    if with_empty:
        streams[" with empty segments"] = cu_seqlens
    layers = _layers(model, attention, streams)
    return {label: _measured(steps, rounds) for label, steps in layers.items()}


def times_table(title: str, times: Mapping[str, Times]) -> Iterator[str]:
    """Yield the lines of a table of milliseconds by kernel; a dash where a kernel has no figure."""
    figures = sorted({figure for by_figure in times.values() for figure in by_figure})
    rows = [
        (kernel, *(f"{by[figure]:.3f}" if figure in by else "-" for figure in figures))
        for kernel, by in times.items()
    ]
    return text_table((title, *figures), rows, numbers=figures)


def documents(slots: int, seq_length: int, mean: int) -> NDArray[np.int32]:
    """Return borders [n + 1] of full rows of documents with lognormal lengths, and empty segments.

    A row has as many segments as there is room for, as rows of a sample order have.
    """
    draw = np.random.default_rng(0)
    room = seq_length // SLOTS_PER_SEGMENT + 1
    boundaries = [0]
    for begin in range(0, slots, seq_length):
        lengths = np.maximum(draw.lognormal(np.log(mean) - 0.5, 1.0, room).astype(int), 1)
        boundaries += (begin + np.minimum(np.cumsum(lengths), seq_length)).tolist()
        boundaries[-1] = begin + seq_length
    return np.array(boundaries, dtype=np.int32)


def _layers(
    model: ModelConfig, attention: Attention, streams: Mapping[str, NDArray[np.int32]]
) -> dict[str, dict[str, Step]]:
    """Return forward and backward passes by kernel and kind of layer.

    `streams` are borders of segments, by what is said of them; those of the first have no empty
    ones.
    """
    device = distributed.device()
    precision: Literal["bf16", "fp32"] = "bf16" if device.type == "cuda" else "fp32"
    config = transformer_config(model, attention, HardwareConfig(precision=precision))
    mask = ATTENTION_MASKS[attention]
    groups = ProcessGroupCollection.use_mpu_process_groups(["cp"])
    layers_by_kernel: dict[str, dict[str, Step]] = {}
    for (label, ends), (name, kind) in itertools.product(streams.items(), _kernels().items()):
        if label and kind is TransformerEngineCoreAttention:
            continue
        packed = PackedRows.of(
            torch.from_numpy(ends).to(device),
            int(np.diff(ends).max()),
            torch.zeros(int(ends[-1]), device=device),
            torch.zeros(0, device=device),
        )
        layers = {}
        for number, layer in enumerate(LAYERS[:2], start=1):
            core = kind(config, number, mask, "self", pg_collection=groups)
            if serves(core):
                layers[layer] = attention_passes(core, packed)
        layers_by_kernel[name + label] = layers
    return layers_by_kernel


def _kernels() -> dict[str, type[CoreAttention]]:
    """Return the attentions that this machine can have, by name."""
    if distributed.device().type == "cpu":
        return {"sdpa": SdpaCoreAttention}
    kernels: dict[str, type[CoreAttention]] = {"varlen": VarlenCoreAttention}
    if transformer_engine_lack() is None:
        kernels["transformer_engine"] = TransformerEngineCoreAttention
    return kernels


def _measured(layers: dict[str, Step], rounds: int) -> Times:
    """Return milliseconds of each kind of layer, and on a GPU of starting a layer's passes."""
    milliseconds = {
        f"{kind}_ms": 1e3 * median_seconds(step, untimed=WARM_UP, timed=rounds, device_alone=True)
        for kind, step in layers.items()
    }
    if torch.cuda.is_available() and len(layers) == len(set(LAYERS)):
        milliseconds["host_ms"] = _started_ms([layers[kind] for kind in LAYERS], rounds)
    return milliseconds


def _started_ms(steps: Sequence[Step], rounds: int) -> float:
    """Return the median time in which the host starts one of `steps`, each after the others."""
    times = []
    for _ in range(rounds):
        wait_for_device()
        begin = time.perf_counter()
        for step in steps:
            step()
        times.append(1e3 * (time.perf_counter() - begin) / len(steps))
    wait_for_device()
    return statistics.median(times)
