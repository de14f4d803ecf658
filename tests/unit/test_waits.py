"""A step of training on a CPU asks for no operation by which a host would wait for a GPU.

But for those in CPU_ONLY. `tests/gpu/test_hot_path.py` asks a GPU itself.
"""

import threading
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fake_gpu import host_waits
from megatron_ettin import distributed
from tests.conftest import TinyCorpus
from tests.runs import tiny_config
from tests.training import train_within

#: What is asked for where no GPU is waited for, by whom, and why a GPU does not get there.
CPU_ONLY = {
    ("lift_fresh", "megatron_ettin/model/dropout.py apply"): "a kernel draws the factors",
    ("numpy", "megatron_ettin/model/dropout.py apply"): "a kernel draws the factors",
    ("lift_fresh", "megatron_ettin/model/linear_cross_entropy.py _statistics_"): "a kernel does it",
    ("tolist", "megatron_ettin/model/attention.py lengths"): "of SdpaCoreAttention; a GPU has it "
    "in fp32 alone, for comparisons (docs/gpu.md)",
    ("repeat_interleave", "megatron_ettin/model/attention.py block_mask"): "of SdpaCoreAttention",
    ("lift_fresh", "megatron/core/pipeline_parallel/schedules.py forward_step_calc_loss"): "the "
    "number of tokens stays in host memory",
    (
        "_local_scalar_dense",
        "megatron/core/distributed/finalize_model_grads.py finalize_model_grads",
    ): "Megatron-Core 0.16 asks whether there are tokens, 0.19 does not",
}


#: Methods by which a host reads a tensor and that a CPU answers without an operation.
READS = ("tolist", "numpy", "cpu", "to")


class Waits(TorchDispatchMode):
    """Notes what a host would wait for, in its thread, and who asks for it.

    Operations whose result a host needs, or that send what a Python list holds; methods that read
    a tensor, or copy it to the memory of the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []
        self.operations = 0
        self._patches = ExitStack()

    def __enter__(self) -> Self:
        thread = threading.get_ident()
        for name in READS:
            # A TorchFunctionMode would not see what Tensor.backward calls.
            method = self._noted(name, getattr(torch.Tensor, name), thread)
            self._patches.enter_context(mock.patch.object(torch.Tensor, name, method))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        self.operations += 1
        if host_waits(name, args, kwargs):
            self.asked.append((name, asking_function()))
        return func(*args, **kwargs)

    def _noted(self, name: str, method: Callable[..., Any], thread: int) -> Callable[..., Any]:
        """Return a method of tensors that notes its calls in a thread; of `to`, those to a CPU."""

        def noting(*args: Any, **kwargs: Any) -> Any:
            reads = name != "to" or "cpu" in map(str, [*args[1:], *kwargs.values()])
            if reads and threading.get_ident() == thread:
                self.asked.append((name, asking_function()))
            return method(*args, **kwargs)

        return noting


def asking_function() -> str:
    """Return file and name of the innermost function on the stack that is ours or Megatron's."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("megatron_ettin/", "megatron/core/"):
            _, found, rest = frame.filename.rpartition(f"/{package}")
            # cpu.py stands in for calls of Megatron-Core that name a GPU.
            if found and rest != "cpu.py":
                return f"{package}{rest} {frame.name}"
    return ""


@pytest.mark.parametrize("objective", ["MaskedLM", "CausalLM"])
def test_a_step_asks_for_nothing(tiny_corpus: TinyCorpus, tmp_path: Path, objective: str) -> None:
    config = tiny_config(tiny_corpus, tmp_path / "run", objective=objective)
    waits = Waits()
    with distributed.process_groups(config.hardware):
        # The first step builds tables.
        train_within(config, waits, before=1, inside=2)
    assert waits.operations > 1000
    assert set(waits.asked) <= set(CPU_ONLY)


@pytest.mark.parametrize(
    ("ask", "noted"),
    [
        (lambda x: x.sum().item(), ["_local_scalar_dense"]),
        (lambda x: bool(x[0]), ["_local_scalar_dense"]),
        (lambda x: x[: x[1]], ["_local_scalar_dense"]),
        (lambda x: x.nonzero(), ["nonzero"]),
        (lambda x: x[x > 1], ["index"]),
        (lambda x: x.masked_select(x > 1), ["masked_select"]),
        (lambda _: torch.tensor([1, 2, 3]), ["lift_fresh"]),
        (lambda x: x.tolist(), ["tolist"]),
        (lambda x: x.numpy(), ["numpy"]),
        (np.asarray, ["numpy"]),
        (lambda x: x.cpu(), ["cpu"]),
        (lambda x: x.to("cpu"), ["to"]),
        (lambda x: x.to(device=torch.device("cpu")), ["to"]),
        (lambda x: torch.equal(x, x), ["equal"]),
        (lambda x: torch.allclose(x, x), ["allclose"]),
        (lambda x: x.bincount(), ["bincount"]),
        (lambda x: x.unique(), ["_unique2"]),
        (lambda x: x.unique_consecutive(), ["unique_consecutive"]),
        (lambda x: torch.repeat_interleave(x, x), ["repeat_interleave"]),
        (lambda x: torch.repeat_interleave(x, x, output_size=3), []),
        (lambda x: x[x - 1] + x.sum() + x.index_select(0, x).repeat_interleave(2).max(), []),
    ],
)
def test_waits_are_seen(ask: Callable[[torch.Tensor], object], noted: list[str]) -> None:
    numbers = torch.arange(3)
    with Waits() as waits:
        ask(numbers)
    assert waits.asked == [(name, "") for name in noted]


class _Read(torch.autograd.Function):
    """Identity whose backward pass reads its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        gradients[0].tolist()
        torch.equal(gradients[0], gradients[0])
        return gradients[0]


def test_waits_of_a_backward_pass_are_seen() -> None:
    x = torch.ones(3, requires_grad=True)
    with Waits() as waits:
        _Read.apply(x).sum().backward()  # type: ignore[no-untyped-call]
    assert [name for name, _ in waits.asked] == ["tolist", "equal"]
