"""A step of training on a CPU asks for no operation by which a host would wait for a GPU.

Two places may, because a GPU does not come there: the CPU's attention reads the lengths of
documents, and its dropout reads row numbers; both read memory without an operation of torch.
`tests/gpu/test_hot_path.py` asks a GPU itself.
"""

import itertools
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fake_gpu import WAITS
from megatron_ettin import distributed
from megatron_ettin.data.orders import open_order
from megatron_ettin.training import set_up
from megatron_ettin.training.interval import Interval
from megatron_ettin.training.loop import train_step
from megatron_ettin.training.preparation import phase_micro_batches, prefetch
from tests.conftest import TinyCorpus
from tests.runs import tiny_config


class NoWaits(TorchDispatchMode):
    """Notes operations whose result a host needs, or that send it what a Python list holds."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations += 1
        if name in WAITS:
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["MaskedLM", "CausalLM"])
def test_a_step_asks_for_nothing(tiny_corpus: TinyCorpus, tmp_path: Path, objective: str) -> None:
    config = tiny_config(tiny_corpus, tmp_path / "run", objective=objective)
    with distributed.process_groups(config.hardware):
        order = open_order(config)
        state = set_up.starting_state(config, order)
        run = set_up.build_training(config, order, state)
        with run.reporter:
            state = set_up.restore(run, state)
            interval, end = Interval(), order.spec.phases[0].end_g
            with prefetch(phase_micro_batches(config, run.loader, state, end)) as prepared:
                steps = itertools.groupby(prepared, key=attrgetter("step"))
                # The first step builds tables.
                for step, batches in itertools.islice(steps, 1):
                    state = train_step(run, step, batches, state, 1e-3, interval)
                with NoWaits() as waits:
                    for step, batches in itertools.islice(steps, 2):
                        state = train_step(run, step, batches, state, 1e-3, interval)
        run.recorder.close()
    assert waits.operations > 1000
    assert waits.asked == []


def test_waits_are_seen() -> None:
    numbers = torch.arange(3)
    with NoWaits() as waits:
        numbers.sum().item()
        numbers.nonzero()
        torch.tensor([1, 2, 3])
    assert (
        waits.asked
        == ["_local_scalar_dense", "nonzero", "lift_fresh", "nonzero"][: len(waits.asked)]
    )
    assert len(waits.asked) >= 3
