"""The GPUs that estimates and reports know: their memory and the peak of their matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["cpu", "cuda"]
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one rank runs on."""

    name: str
    kind: Kind
    memory_bytes: int
    """Memory that a process can get; on a CPU, the machine's, which all ranks share."""
    peak_flops: dict[str, float]
    """Dense matrix products by precision, FLOP/s; on a CPU, of all cores together."""
    runtime_bytes: int
    """What a rank needs before it holds a tensor: libraries, on a GPU the CUDA context."""
    cuda_name: str | None = None
    """What CUDA calls it; None for a CPU."""


#: Libraries on a GPU: the context of CUDA and its handles. Not measured here.
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


def gpu_called(cuda_name: str) -> Device | None:
    """Return the GPU that CUDA calls `cuda_name`; None if the table has none, as for other forms.

    The whole name counts: of an H100, the PCIe form has three quarters of the SXM form's peak.
    """
    return next((gpu for gpu in GPUS.values() if gpu.cuda_name == cuda_name), None)
