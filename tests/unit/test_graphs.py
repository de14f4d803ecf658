"""Passes on memory of their own, as graphs need it, train what Megatron-Core's loop trains.

No graph here: "captured" is a function that does the same work again. tests/gpu has real ones.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig, RunConfig
from megatron_ettin.data.orders import open_order
from megatron_ettin.evaluation.layouts import (
    final_weights,
    largest_weight_difference,
    read_curve,
)
from megatron_ettin.model.ettin_model import EttinModel
from megatron_ettin.training import graphs, preparation, set_up
from megatron_ettin.training.graphs import WARM_UP, CudaCapture, GraphedForwardBackward
from megatron_ettin.training.loop import train
from megatron_ettin.training.micro_batch import MicroBatch, Report, scored_capacity
from megatron_ettin.training.preparation import phase_micro_batches
from tests.conftest import TinyCorpus
from tests.runs import tiny_config

#: Four micro-batches a step; the second phase has other rotary tables.
PHASE = {"name": "short", "train_tokens": 12_000, "seq_length": 64, "global_batch_size": 32}
PHASES = [PHASE, {**PHASE, "name": "long", "rotary_base_global": 160_000.0}]


@pytest.fixture(autouse=True)
def shapes_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        preparation, "scored_capacity", lambda kind, *rest: scored_capacity("cuda", *rest)
    )


class Captured:
    """Counts what is captured, and how often that runs again, on the tables of its phase."""

    stage: EttinModel

    def __init__(self) -> None:
        self.functions = self.runs = self.beside_graphs = 0

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.beside_graphs += 1
        yield

    def __call__(self, function: Callable[[], Report]) -> Callable[[], Report]:
        self.functions += 1
        tables, memory = self.stage.rotary, Report()

        def again() -> Report:
            self.runs += 1
            assert self.stage.rotary is tables
            for name, value in function().items():
                # Each time the same memory, as a graph's.
                memory.setdefault(name, torch.empty_like(value)).copy_(value)
            return memory

        return again


def trained(config: RunConfig, captured: Captured | None = None) -> Path:
    """Train the run, on passes that `captured` captures if it is given; return its folder."""
    with distributed.process_groups(config.hardware):
        order = open_order(config)
        state = set_up.starting_state(config, order)
        run = set_up.build_training(config, order, state)
        if captured is not None:
            captured.stage = run.stage
            run = dataclasses.replace(
                run, forward_backward=GraphedForwardBackward(run.stage, lambda: captured)
            )
        with run.reporter:
            train(run, set_up.restore(run, state))
    return Path(config.run_dir)


def assert_equal(found: Path, expected: Path) -> None:
    """Check that two runs reported the same losses and ended in the same weights."""
    assert read_curve(found) == read_curve(expected)
    assert largest_weight_difference(final_weights(found), final_weights(expected))[0] == 0.0


@pytest.mark.parametrize("objective", ["MaskedLM", "CausalLM"])
def test_captured_passes_train_the_same(
    tiny_corpus: TinyCorpus, tmp_path: Path, objective: str
) -> None:
    settings = {"objective": objective, "phases": PHASES}
    captured = Captured()
    plain = trained(tiny_config(tiny_corpus, tmp_path / "plain", **settings))
    ours = trained(tiny_config(tiny_corpus, tmp_path / "ours", **settings), captured)
    micro_batches = 4 * len(read_curve(plain).losses)
    assert micro_batches / 3 < captured.runs <= micro_batches - WARM_UP * captured.functions
    assert captured.beside_graphs == micro_batches - captured.runs
    assert_equal(ours, plain)


def test_rare_shapes_are_not_captured(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    settings = {"objective": "MaskedLM", "phases": [PHASE]}
    captured = Captured()
    plain = trained(tiny_config(tiny_corpus, tmp_path / "plain", **settings))
    ours = trained(tiny_config(tiny_corpus, tmp_path / "ours", **settings), captured)
    assert captured.functions == 1
    micro_batches = 4 * len(read_curve(plain).losses)
    assert 0 < captured.runs < micro_batches - WARM_UP
    assert captured.beside_graphs == micro_batches - captured.runs
    assert_equal(ours, plain)


def test_a_run_with_graphs_has_few_counts_of_segments(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    counts = {}
    for name, hardware in (("plain", {}), ("graphs", {"precision": "bf16", "cuda_graphs": True})):
        config = tiny_config(
            tiny_corpus, tmp_path / name, phases=[PHASE], objective="MaskedLM", hardware=hardware
        )
        with distributed.process_groups(HardwareConfig()):
            order = open_order(config)
            state = set_up.starting_state(config, order)
            loader, end = set_up.build_loader(config, order), order.spec.phases[0].end_g
            prepared = phase_micro_batches(config, loader, state, end)
            counts[name] = {len(each.micro_batch.packed.cu_seqlens_q) - 1 for each in prepared}
    assert counts["graphs"] == {1 << (count - 1).bit_length() for count in counts["plain"]}
    assert counts["graphs"] != counts["plain"]


def test_passes_without_a_graph_take_the_graphs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the calls of torch: a CPU has no such memory."""
    pool, pools = SimpleNamespace(id=(0, 7)), []

    @contextmanager
    def block(*_: object, pool: object, **__: object) -> Iterator[None]:
        pools.append(pool)
        yield
        pools.remove(pool)

    for name, stand_in in (
        ("MemPool", lambda: pool),
        ("CUDAGraph", lambda: SimpleNamespace(replay=lambda: None)),
        ("current_stream", lambda: None),
        ("graph", block),
        ("use_mem_pool", lambda pool: block(pool=pool)),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    capture = CudaCapture()
    seen: list[tuple[object, bool]] = []

    def passes() -> Report:
        seen.append((list(pools), torch.autograd.is_multithreading_enabled()))
        return {}

    with capture.beside():
        passes()
    capture(passes)()
    with capture.beside():
        passes()
    # The first pass makes what stays; a pool serves one thread, so autograd must have no other.
    assert seen == [([], True), ([(0, 7)], True), ([pool], False)]


def test_a_report_outlives_the_memory_of_its_pass() -> None:
    reused = torch.tensor([1.0])
    shape = graphs._ShapeGraph(Captured(), is_rare=True)
    report = shape.run(cast(MicroBatch, None), lambda _: {"loss_sums": reused})
    reused.fill_(2.0)
    assert report["loss_sums"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"tensor_parallel_size": 2}, "parallel sizes"),
        ({"context_parallel_size": 2}, "parallel sizes"),
        ({"pipeline_parallel_size": 2}, "parallel sizes"),
        ({"recompute": "full"}, "recompute"),
        ({"precision": "fp32"}, "precision"),
        ({"precision": "fp8", "fp8_recipe": "delayed"}, "fp8_recipe"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(settings: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=rf"hardware.cuda_graphs: .*{field}"):
        HardwareConfig(**{"precision": "bf16", "cuda_graphs": True, **settings})  # type: ignore[arg-type]
