"""Times of two layers of a run's model, a global and a local one, at the run's micro-batch.

`precision.py` asks for them once on each machine; no step of training comes here.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_ettin import distributed
from megatron_ettin.config import FIRST_ROTARY_BASES, RunConfig
from megatron_ettin.model.attention import PackedRows
from megatron_ettin.model.backend import choose_backend
from megatron_ettin.model.layer_spec import block_spec
from megatron_ettin.model.provider import ATTENTION_MASKS, transformer_config
from megatron_ettin.model.rotary import RotaryTables
from megatron_ettin.objectives import attentions

#: Numbers of untimed rounds, in which kernels are compiled and chosen, and of timed rounds.
ROUNDS = {"cpu": (1, 3), "cuda": (5, 20)}
#: Cycles of a GPU in a second, at most; and how many times as long as the host should need to queue
#: all calls the GPU is kept waiting.
CYCLES_PER_SECOND, QUEUED = 2e9, 2


def layer_seconds(config: RunConfig) -> float:
    """Return the time of a global and a local layer, forward and backward, per micro-batch.

    All ranks call this: tensor- and context-parallel ranks share the layers.
    """
    hardware = dataclasses.replace(config.hardware, pipeline_parallel_size=1)
    model = dataclasses.replace(config.model, num_layers=2, global_attention_every=2)
    phase = max(config.phases, key=lambda phase: phase.train_tokens)
    attention, *_ = attentions(config.objective, [phase.name])
    backend = choose_backend(model, hardware)
    settings = transformer_config(model, attention, hardware, backend)
    spec = block_spec(settings, ATTENTION_MASKS[attention], range(2), backend)
    device = distributed.device()
    block = TransformerBlock(settings, spec, pre_process=True, post_process=False).to(device)
    for parameter in block.parameters():
        with torch.no_grad():
            parameter.copy_(_ramp(parameter.shape, 0.03, device))
        # Transformer Engine accumulates gradients here, as in a run.
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    seq_length = phase.seq_length
    slots = hardware.micro_batch_rows(seq_length) * seq_length
    packed = _whole_rows(slots, seq_length, slots // hardware.context_parallel_size, device)
    tables = RotaryTables(settings, *FIRST_ROTARY_BASES).of(packed)
    shape = torch.Size((slots // hardware.slot_ranks, 1, model.hidden_size))
    hidden = _ramp(shape, 1.0, device).to(settings.params_dtype).requires_grad_()

    def step() -> None:
        # The first micro-batch of a step casts the weights again; with fp8 it costs most.
        block.set_is_first_microbatch()
        out = block(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=tables,
            packed_seq_params=packed,
        )
        out.backward(hidden.detach())

    untimed, timed = ROUNDS[device.type]
    return median_seconds(step, untimed=untimed, timed=timed)


def _whole_rows(slots: int, seq_length: int, local_slots: int, device: torch.device) -> PackedRows:
    """Return a stream with one document in each row, of which this rank has the first slots."""
    cu_seqlens = torch.arange(0, slots + 1, seq_length, dtype=torch.int32, device=device)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    positions = torch.arange(local_slots, device=device) % seq_length
    return PackedRows.of(cu_seqlens, seq_length, position_ids=positions, g=nothing)


def _ramp(shape: torch.Size, peak: float, device: torch.device) -> torch.Tensor:
    """Return numbers from -peak to peak; zeros or NaN would take other times."""
    return torch.linspace(-peak, peak, shape.numel(), device=device).view(shape)


def median_seconds(
    step: Callable[[], object], *, untimed: int, timed: int, device_alone: bool = False
) -> float:
    """Return the median time of `step`; on a GPU a call is queued before the last one has ended.

    If `device_alone`, the GPU begins when all calls are queued: then a step whose kernels are
    shorter than the host needs to start them takes the kernels' time, as inside a CUDA graph.
    """
    for _ in range(untimed):
        before = time.perf_counter()
        step()
        host_seconds = time.perf_counter() - before
    if not torch.cuda.is_available():
        stamps = [time.perf_counter()]
        for _ in range(timed):
            step()
            stamps.append(time.perf_counter())
        return statistics.median(b - a for a, b in itertools.pairwise(stamps))
    marks = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(timed + 1)
    ]
    if device_alone:
        cycles = round(QUEUED * timed * host_seconds * CYCLES_PER_SECOND)
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))
