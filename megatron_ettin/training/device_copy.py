"""Arrays in one buffer, copied to the device without waiting.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_ettin import distributed

#: Arrays in a buffer start at multiples of this many bytes: whole cache lines, and more than any
#: dtype needs, so that every view is aligned.
ALIGNMENT = 128


def make_copy_stream() -> torch.cuda.Stream | None:
    """Return a stream for copies to this rank's GPU; None on a CPU."""
    device = distributed.device()
    if device.type == "cpu":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def copy_to_device(
    arrays: dict[str, NDArray[Any]], stream: torch.cuda.Stream | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.cuda.Event | None]:
    """Lay arrays [k] into one buffer and copy it to the GPU of `stream`, without waiting.

    Without a stream the buffer stays on the CPU. Torch reuses its memory: a pinned buffer's after
    the copy, any other once no tensor views it.

    Returns:
        The buffer on the device [bytes] uint8, its views by name, and the end of the copy.
    """
    ends = np.cumsum([-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays.values()])
    begins = dict(zip(arrays, [0, *ends.tolist()], strict=False))
    if stream is None:
        memory = _filled(arrays, begins, int(ends[-1]), pinned=False)
        copied = None
    else:
        with torch.cuda.stream(stream):
            staging = _filled(arrays, begins, int(ends[-1]), pinned=True)
            memory = staging.to(stream.device, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(stream)
    views = {
        name: memory[begins[name] : begins[name] + array.nbytes].view(_torch_dtype(array))
        for name, array in arrays.items()
    }
    return memory, views, copied


def _filled(
    arrays: dict[str, NDArray[Any]], begins: dict[str, int], size: int, *, pinned: bool
) -> torch.Tensor:
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    for name, array in arrays.items():
        begin = begins[name]
        buffer.numpy()[begin : begin + array.nbytes].view(array.dtype)[:] = array
    return buffer


def _torch_dtype(array: NDArray[Any]) -> torch.dtype:
    types = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32}
    return types[array.dtype.name]
