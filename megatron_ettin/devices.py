"""Devices: GPUs by their data sheets, and this machine's CPU, measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """Device of one rank."""

    name: str
    kind: Literal["cpu", "cuda"]
    memory_bytes: int
    """Memory that a process can get; on a CPU, the machine's, which all ranks share."""
    peak_flops: dict[str, float]
    """Dense matrix products by precision, FLOP/s; on a CPU, of all cores together."""
    runtime_bytes: int
    """Memory of a rank that holds no tensor yet: libraries, on a GPU the CUDA context."""
    cuda_name: str | None = None
    """Name that CUDA reports; None for a CPU."""


#: Libraries on a GPU: the CUDA context and its handles. An assumption, never measured by us.
CUDA_RUNTIME_BYTES = GIB


def _gpu(name: str, cuda_name: str, memory_gib: float, bf16: float, fp32: float) -> Device:
    return Device(
        name=name,
        kind="cuda",
        memory_bytes=int(memory_gib * GIB),
        peak_flops={"bf16": bf16 * 1e12, "fp32": fp32 * 1e12},
        runtime_bytes=CUDA_RUNTIME_BYTES,
        cuda_name=cuda_name,
    )


#: Peaks: NVIDIA's data sheets (SXM forms; bf16 dense with fp32 accumulation; fp32 without tensor
#: cores, as torch computes it by default). Memory: what torch reports as the device's total.
GPUS = {
    "h100": _gpu("H100 SXM 80 GB", "NVIDIA H100 80GB HBM3", 79.1, 989.4, 66.9),
    "h200": _gpu("H200 SXM 141 GB", "NVIDIA H200", 139.8, 989.4, 66.9),
    "a100-80": _gpu("A100 SXM 80 GB", "NVIDIA A100-SXM4-80GB", 79.1, 312.0, 19.5),
    "a100-40": _gpu("A100 SXM 40 GB", "NVIDIA A100-SXM4-40GB", 39.4, 312.0, 19.5),
    "l40s": _gpu("L40S 48 GB", "NVIDIA L40S", 44.4, 362.0, 91.6),
}
DEVICES = ("cpu", *GPUS)


def gpu_called(cuda_name: str) -> Device | None:
    """Return the GPU with the CUDA name `cuda_name`; None if the table lacks it.

    The whole name counts: of an H100, the PCIe form has three quarters of the SXM form's peak.
    """
    return next((gpu for gpu in GPUS.values() if gpu.cuda_name == cuda_name), None)


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
    left = np.random.default_rng(0).random((2048, 2048), dtype=np.float32)  # noqa: TID251
    right = left.T.copy()
    # The best of many repetitions: other work on the machine only ever slows one down.
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        begin = time.perf_counter()
        left @ right
        best = max(best, 2.0 * 2048**3 / (time.perf_counter() - begin))
    return best


def measured_runtime_bytes() -> int:
    """Return the resident set of a process that has imported what training imports."""
    # A process of its own: this one has already imported other things, and no torch.
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
