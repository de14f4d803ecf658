"""The devices that an estimate knows: GPUs by their data sheets, and this machine, measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np

from megatron_ettin.model.gpus import GPUS, Device

DEVICES = ("cpu", *GPUS)


def device(name: str) -> Device:
    """Return the device `name` of DEVICES; for the CPU, this machine is measured (10 seconds)."""
    return this_machine() if name == "cpu" else GPUS[name]


def this_machine() -> Device:
    """Measure this machine's CPU: its memory, its peak, what the libraries need."""
    peak = measured_peak_flops()
    return Device(
        name=f"this machine's {os.cpu_count()} cores",
        kind="cpu",
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        peak_flops={"bf16": peak, "fp32": peak},
        runtime_bytes=measured_runtime_bytes(),
    )


def measured_peak_flops(seconds: float = 1.0) -> float:
    """Return the FLOP/s of float32 products of [2048, 2048] on all cores, the best of a second."""
    left = np.random.default_rng(0).random((2048, 2048), dtype=np.float32)
    right = left.T.copy()
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        begin = time.perf_counter()
        left @ right
        best = max(best, 2.0 * 2048**3 / (time.perf_counter() - begin))
    return best


def measured_runtime_bytes() -> int:
    """Return the resident set of a process that has imported what training imports."""
    program = (
        "import megatron_ettin.training.set_up, pathlib\n"
        "print(pathlib.Path('/proc/self/statm').read_text().split()[1])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise OSError(f"the training libraries cannot be imported:\n{done.stderr[-2000:]}")
    return int(done.stdout) * os.sysconf("SC_PAGE_SIZE")
