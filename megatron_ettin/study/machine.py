"""Devices of this machine that a study uses.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import os

import torch


def num_workers(num_devices: int) -> int:
    """Return how many of a study's devices this machine has: GPUs, or without any, cores."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else _num_cores()
    return min(num_devices, here)


def threads_of_worker(num_devices: int) -> int:
    """Return the threads of a worker on the CPU: an equal share of the cores."""
    return _num_cores() // num_workers(num_devices)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def worker_environments(num_devices: int) -> list[dict[str, str]]:
    """Return the environment variables of each device's worker."""
    num = num_workers(num_devices)
    if torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = seen.split(",") if seen else [str(index) for index in range(num)]
        return [{"CUDA_VISIBLE_DEVICES": name} for name in names[:num]]
    return [{"OMP_NUM_THREADS": str(threads_of_worker(num_devices))}] * num
