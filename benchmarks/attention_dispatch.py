"""Time that a host takes to call torch's attention, forward and backward, without its kernels.

python -m benchmarks.attention_dispatch

Torch's two operations are replaced by ones that only allocate, so that no GPU is needed. What stays
is the calls around them: ours, and those of `torch.nn.attention.varlen`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

from megatron_ettin.model.attention import PackedRows
from megatron_ettin.model.attention_gpu import varlen

ROUNDS, CALLS = 9, 100
WINDOW = (16, 16)


def main() -> None:
    """Time both in turns; print the medians and their ratio."""
    library = _allocating_operations()
    q, k, v = (torch.randn(64, 2, 32, requires_grad=True) for _ in range(3))
    ends, nothing = torch.tensor([0, 64], dtype=torch.int32), torch.empty(0)
    packed = PackedRows.of(ends, 64, nothing, nothing)
    calls: dict[str, Callable[[], Any]] = {
        "torch.nn.attention.varlen": lambda: varlen_attn(
            q, k, v, ends, ends, 64, 64, window_size=WINDOW
        ),
        "model/attention_gpu.py": lambda: varlen(
            q, k, v, packed, None, is_causal=False, window=WINDOW
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(_microseconds(call))
    for name, by_round in times.items():
        print(f"{name}: {statistics.median(by_round):.0f} us")
    theirs, ours = (statistics.median(by_round) for by_round in times.values())
    print(f"ratio: {theirs / ours:.1f}")
    del library


def _microseconds(call: Callable[[], Any]) -> float:
    """Return the mean CPU time of a pass forward and backward."""
    gradient = torch.ones(64, 2, 32)
    begin = time.process_time()
    for _ in range(CALLS):
        call().backward(gradient)
    return 1e6 * (time.process_time() - begin) / CALLS


def _allocating_operations() -> torch.library.Library:
    """Give the CPU, which lacks them, torch's two operations for as long as the result lives."""

    def forward(query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        number = torch.empty(2)
        return torch.empty_like(query), torch.empty(2, 64), number, number, number

    def backward(_: torch.Tensor, *inputs: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        query, key, value = (torch.empty_like(x) for x in inputs[:3])
        return query, key, value

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("_flash_attention_forward", forward, "CPU")  # type: ignore[no-untyped-call]
    library.impl("_flash_attention_backward", backward, "CPU")  # type: ignore[no-untyped-call]
    return library


if __name__ == "__main__":
    main()
