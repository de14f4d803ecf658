"""Figures of a rank's device: the share of its peak speed, and the memory that was needed.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from megatron_ettin import distributed
from megatron_ettin.devices import Device, gpu_called
from megatron_ettin.model.counts import mfu

logger = logging.getLogger(__name__)


def mfu_field(gpu: Device | None, flops_per_second: float, ranks: int) -> dict[str, float]:
    """Return the field `mfu` of a line: the share of the peak of `ranks` GPUs that was used.

    There is no field if the peak is unknown. A share above 1 is logged as an error and left out,
    for a wrong figure must not end a run. `flops_per_second` is the sum over all ranks.
    """
    if gpu is None:
        return {}
    peak = gpu.peak_flops["bf16"] * ranks
    try:
        return {"mfu": mfu(flops_per_second, peak, f"{ranks} x {gpu.name}")}
    except ValueError as error:
        logger.error("%s", error)
        return {}


def known_gpu() -> Device | None:
    """Return this rank's GPU if its peak is known, else log that it is not. None on a CPU."""
    device = distributed.device()
    if device.type == "cpu":
        return None
    name = torch.cuda.get_device_name(device)
    gpu = gpu_called(name)
    if gpu is None:
        logger.info("the peak of %s is not known: metrics.jsonl has no mfu", name)
    return gpu


def peak_memory_bytes() -> int:
    """Return the largest memory that this rank has needed so far (tools/estimate.py predicts it).

    On a GPU: the peak of torch's allocations, without the CUDA context. On a CPU: the peak of the
    process's resident set, from /proc, because `getrusage` starts from the parent's peak.
    """
    if distributed.device().type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024
    raise OSError("/proc/self/status has no VmHWM")
