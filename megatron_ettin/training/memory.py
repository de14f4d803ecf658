"""The memory that this rank has needed so far, for the metrics (tools/estimate.py predicts it)."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_ettin import distributed


def peak_memory_bytes() -> int:
    """Return the largest memory of this rank up to now.

    On a GPU: what torch has allocated at once, without the CUDA context. On CPU: the resident set
    of the process. `getrusage` would not do there: a process inherits its parent's value.
    """
    if distributed.device().type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024
    raise OSError("/proc/self/status has no VmHWM")
