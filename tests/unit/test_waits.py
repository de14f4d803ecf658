"""A step of training on a CPU asks for no operation by which a host would wait for a GPU.

But for those in CPU_ONLY. `tests/gpu/test_hot_path.py` asks a GPU itself.
"""

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fake_gpu import WAITS
from megatron_ettin import distributed
from tests.conftest import TinyCorpus
from tests.runs import tiny_config
from tests.training import train_within

#: Operations and files that ask for them where no GPU waits: the CPU's dropout reads factors from
#: C++, its loss compares with a number; Megatron-Core counts tokens in host memory, and 0.16 asks
#: whether there are any (0.19, which GPUs have, does not).
CPU_ONLY = {
    ("lift_fresh", "megatron_ettin/model/dropout.py"),
    ("lift_fresh", "megatron_ettin/model/linear_cross_entropy.py"),
    ("lift_fresh", "megatron/core/pipeline_parallel/schedules.py"),
    ("_local_scalar_dense", "megatron/core/distributed/finalize_model_grads.py"),
}


class Waits(TorchDispatchMode):
    """Notes operations whose result a host needs, or that send it what a Python list holds."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations += 1
        if name in WAITS:
            self.asked.append((name, asking_file()))
        return func(*args, **(kwargs or {}))


def asking_file() -> str:
    """Return the innermost file on the stack that is ours or Megatron-Core's."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("megatron_ettin/", "megatron/core/"):
            _, found, rest = frame.filename.rpartition(f"/{package}")
            # cpu.py stands in for calls of Megatron-Core that name a GPU.
            if found and rest != "cpu.py":
                return package + rest
    return ""


@pytest.mark.parametrize("objective", ["MaskedLM", "CausalLM"])
def test_a_step_asks_for_nothing(tiny_corpus: TinyCorpus, tmp_path: Path, objective: str) -> None:
    config = tiny_config(tiny_corpus, tmp_path / "run", objective=objective)
    waits = Waits()
    with distributed.process_groups(config.hardware):
        # The first step builds tables.
        train_within(config, waits, before=1, inside=2)
    assert waits.operations > 1000
    assert set(waits.asked) <= CPU_ONLY


def test_waits_are_seen() -> None:
    numbers = torch.arange(3)
    with Waits() as waits:
        numbers.sum().item()
        numbers.nonzero()
        torch.tensor([1, 2, 3])
    assert waits.asked == [(name, "") for name in ("_local_scalar_dense", "nonzero", "lift_fresh")]
