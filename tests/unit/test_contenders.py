"""Contenders do the same work: their steps, and the numbers of the plain model."""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from benchmarks import training_cell
from benchmarks.contenders import (
    IGNORED,
    Contender,
    Ours,
    Step,
    Transformers,
    packed_batches,
    padded_batches,
)
from benchmarks.path_cost import PARTS, path_cost
from benchmarks.plain_model import PlainModel
from benchmarks.throughput import Measurement, one_by_one, side_by_side
from benchmarks.training_cells import ALLOCATOR, training_cells
from megatron_ettin import distributed
from megatron_ettin.config import RunConfig
from megatron_ettin.data.orders import open_order
from megatron_ettin.training.preparation import micro_batches
from megatron_ettin.training.profile import TRACE_FILE
from tests.conftest import TinyCorpus
from tests.runs import tiny_config
from tools import bench_train

pytestmark = pytest.mark.usefixtures("one_process")

ROOT = Path(__file__).parents[2]
OBJECTIVES = ("MaskedLM", "CausalLM")


def config_of(corpus: TinyCorpus, folder: Path, objective: str) -> RunConfig:
    """Return a run of one phase: whole rows of 128, four micro-batches of 512 slots a step."""
    config = tiny_config(corpus, folder / "run", objective=objective)
    return dataclasses.replace(config, phases=config.phases[:1])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_plain_model_computes_what_the_model_computes(
    tiny_corpus: TinyCorpus, tmp_path: Path, objective: str
) -> None:
    ours = Ours(config_of(tiny_corpus, tmp_path, objective))
    stage, batch = ours.run.stage, next(micro_batches(ours.run.loader, 0, 4))
    plain = PlainModel(stage, 10_000.0, 10_000.0)
    # In training, so that the dropout is compared too.
    packed = dataclasses.replace(batch.packed, dropout=stage.output_dropout)
    loss = plain(batch.tokens, packed, batch.scored, batch.labels)
    loss.backward()
    expected = stage.train()(batch.tokens, batch.packed, batch.scored, batch.labels).total
    expected.backward()
    ours.close()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, parameter in stage.named_parameters():
        found, wanted = plain.weights[name.replace(".", "/")].grad, parameter.main_grad
        assert float((found - wanted).norm() / wanted.norm()) <= 1e-5, name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_contender_learns_from_the_tokens_that_it_counts(
    tiny_corpus: TinyCorpus, tmp_path: Path, objective: str
) -> None:
    config = config_of(tiny_corpus, tmp_path, objective)
    order = open_order(config)
    rows = config.phases[0].global_batch_size
    tokens = int(order.row_tokens(0, rows).sum())
    ours = Ours(config)
    peer = Transformers(config, packed_batches(config, order), sparse=False, micro_batches=4)
    before = [p.detach().clone() for p in peer.model.parameters()]
    steps = [ours.step(), peer.step()]
    ours.close()
    assert [step.tokens for step in steps] == [tokens, tokens]
    assert [step.slots for step in steps] == [rows * 128, rows * 128]
    assert steps[0].flops is not None
    assert steps[0].flops > 0.0
    assert any(not torch.equal(a, b) for a, b in zip(before, peer.model.parameters(), strict=True))


def test_data_that_stays_is_the_first_steps_again_and_again(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    ours = Ours(config_of(tiny_corpus, tmp_path, "MaskedLM"))
    steps = [ours.step(), ours.step_again(), ours.step_again(), ours.step()]
    ours.close()
    assert steps[1] == steps[2]
    assert steps[1] not in (steps[0], steps[3])
    assert ours.state.step == 3  # of the order


def test_the_second_micro_batch_of_a_step_is_traced(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    ours = Ours(config_of(tiny_corpus, tmp_path, "MaskedLM"))
    ours.trace(tmp_path)
    ours.close()
    events = json.loads((tmp_path / TRACE_FILE).read_text())["traceEvents"]
    embeddings = [event for event in events if event.get("name") == "aten::embedding"]
    assert len(embeddings) == 1
    assert ours.state.step == 1


@pytest.mark.parametrize("warm_up_steps", [1, 8])
def test_a_contender_is_built_once_for_all_its_variants(
    warm_up_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, steps, ended = [], [], []

    class Counted(Contender):
        def step(self) -> Step:
            steps.append("")
            return Step(tokens=1, slots=1)

        def again(self) -> Step:
            steps.append("_again")
            return Step(tokens=1, slots=1)

        def variants(self) -> dict[str, Callable[[], Step]]:
            return {"": self.step, "_again": self.again}

    def build(slots: int) -> Counted:
        built.append(slots)
        return Counted()

    for name in ("reset_peak_memory_stats", "empty_cache", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 7)
    found = one_by_one(
        {"a": build},
        micro_batch_slots=512,
        rounds=3,
        warm_up_steps=warm_up_steps,
        at_end=ended.append,
    )
    assert built == [512]
    assert steps == [""] * (warm_up_steps + 1 + 3) + ["_again"] * (1 + 3)
    assert [(name, len(each.steps)) for name, each in found.items()] == [("a", 3), ("a_again", 3)]
    assert len(ended) == 1


def test_a_figure_is_printed_before_the_next_one_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU, whose stages may be cut off: two variants of ours in each of two cells."""
    printed: list[str] = []
    known_at: list[tuple[str, int]] = []

    class Slow(Contender):
        def step(self) -> Step:
            return self.take("step")

        def again(self) -> Step:
            return self.take("again")

        def take(self, name: str) -> Step:
            printed.extend(line for line in capsys.readouterr().out.splitlines() if line[:1] == "{")
            known_at.append((name, len(printed)))
            return Step(tokens=1, slots=1)

        def variants(self) -> dict[str, Callable[[], Step]]:
            return {"": self.step, "_again": self.again}

    for name in ("reset_peak_memory_stats", "empty_cache", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 7)
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "0")  # and back afterwards
    monkeypatch.setattr(training_cell.distributed, "process_groups", lambda _: nullcontext())
    monkeypatch.setattr(training_cell, "_contenders", lambda *_: {"ours": lambda _: Slow()})
    monkeypatch.setattr(training_cell, "_profile", lambda *_: {"ours_idle_share": 0.5})
    options = [
        "--device",
        "cuda",
        "--models",
        "nano",
        "17m",
        "--objectives",
        "mlm",
        "--rounds",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *options, "--json"])
    bench_train.main()
    # A warm-up step, a variant's first step, two timed ones; then the other variant, and the trace.
    cell = [("step", 0)] * 4 + [("again", 1)] * 3
    assert known_at == cell + [(name, known + 3) for name, known in cell]
    rest = capsys.readouterr().out
    found = [json.loads(line) for line in [*printed, *rest.splitlines()] if line[:1] == "{"]
    assert [(each["model"], "ours_again_fill" in each) for each in found] == [
        (model, is_again) for model in ("nano", "17m") for is_again in (False, True, False)
    ]
    assert [("ours_fill" in each, "ours_idle_share" in each) for each in found[:3]] == [
        (True, False),
        (False, False),
        (False, True),
    ]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padded_batches_hold_whole_documents(
    tiny_corpus: TinyCorpus, tmp_path: Path, objective: str
) -> None:
    config = config_of(tiny_corpus, tmp_path, objective)
    ids = open_order(config).ids
    for inputs in itertools.islice(padded_batches(config, ids, batch_size=8, by_length=False), 5):
        assert inputs.mask is not None
        lengths = inputs.mask.sum(axis=1)
        assert inputs.tokens.shape == (8, lengths.max())
        assert inputs.tokens.shape[1] <= config.phases[0].seq_length
        assert inputs.real_tokens == lengths.sum()
        assert (inputs.tokens[:, 0] == ids.cls).all()
        assert (inputs.tokens[np.arange(8), lengths - 1] == ids.sep).all()
        assert (inputs.tokens[inputs.mask == 0] == ids.pad).all()
        scored = inputs.labels != IGNORED
        assert not scored[inputs.mask == 0].any()
        if objective == "CausalLM":
            assert (scored == (inputs.mask == 1)).all()
        else:
            assert 0.15 < scored.sum() / inputs.real_tokens < 0.45
            assert (inputs.tokens[scored] == ids.mask).mean() > 0.5


def test_batches_by_length_have_less_padding(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    config = config_of(tiny_corpus, tmp_path, "MaskedLM")
    ids = open_order(config).ids
    fills = []
    for by_length in (False, True):
        batches = padded_batches(config, ids, batch_size=8, by_length=by_length)
        some = list(itertools.islice(batches, 20))
        fills.append(sum(b.real_tokens for b in some) / sum(b.tokens.size for b in some))
    assert fills[1] > fills[0]


def test_rates_are_medians_over_steps() -> None:
    measurement = Measurement(micro_batch_slots=512)
    measurement.steps = [Step(tokens=100, slots=200, flops=f) for f in (10.0, 20.0, 60.0)]
    measurement.seconds = [1.0, 2.0, 4.0]
    assert measurement.tokens_per_s == 50.0
    assert measurement.spread == (25.0, 100.0)
    assert measurement.fill == 0.5
    assert measurement.flops_per_s == 10.0


@pytest.mark.parametrize(("cuda_graphs", "untimed"), [(True, 8), (False, 1)])
def test_steps_with_graphs_are_timed_once_the_usual_shapes_are_captured(
    cuda_graphs: bool, untimed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Step] = []

    class Counted(Contender):
        def step(self) -> Step:
            taken.append(Step(tokens=1, slots=1))
            return taken[-1]

    monkeypatch.setattr(training_cell, "_contenders", lambda *_: {"ours": lambda _: Counted()})
    # It would refuse graphs, as there is no GPU.
    monkeypatch.setattr(distributed, "process_groups", lambda _: nullcontext())
    for name in ("reset_peak_memory_stats", "empty_cache", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 7)
    (cell,) = training_cells(
        models=["nano"],
        objectives=["mlm"],
        precisions=["bf16"],
        device="cuda",
        micro_batch_tokens=1024,
        step_tokens=1024,
        no_peers=True,
        data=ROOT / "examples/data/quickstart.yaml",
        rounds=6,
        cuda_graphs=cuda_graphs,
        path_cost=False,
        profile=None,
        threads=1,
    )
    training_cell.measure(cell, tell=lambda _: None)
    # A variant's own first step and the rounds follow.
    assert len(taken) == untimed + 1 + 6


def test_contenders_take_turns() -> None:
    turns: list[str] = []

    class Named(Contender):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def step(self) -> Step:
            turns.append(self.name)
            return Step(tokens=1, slots=1)

    builders = {name: lambda _, name=name: Named(name) for name in "ab"}
    found = side_by_side(builders, micro_batch_slots=512, rounds=2)
    assert turns == ["a", "b", "a", "b", "a", "b"]
    assert {name: len(measurement.steps) for name, measurement in found.items()} == {"a": 2, "b": 2}


def test_every_part_of_the_path_is_measured(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_corpus, tmp_path, "MaskedLM")
    phase = dataclasses.replace(config.phases[0], global_batch_size=4)
    # A clock that ticks once a reading: the untimed first round reads it once, timed ones twice.
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr("benchmarks.path_cost.time", clock)
    seconds = path_cost(dataclasses.replace(config, phases=[phase]), rounds=2)
    assert tuple(seconds) == PARTS
    assert all(
        (each.megatron, each.plain, each.share) == (1.0, 1.0, 0.0) for each in seconds.values()
    )
    assert next(ticks) == len(PARTS) * 2 * (1 + 2 * 2)


@pytest.mark.slow
def test_the_benchmark_reports_every_contender(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    data = {**tiny_corpus.data, "blend": {"pretrain": {"alpha": 0.7, "beta": 0.3}}, "pools": {}}
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump({"data": data}))
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tools" / "bench_train.py"), "--device", "cpu"),
            *("--models", "nano", "--objectives", "mlm", "clm", "--rounds", "1"),
            *("--data", str(path), "--path-cost", "--json"),
        ],
        capture_output=True,
        check=True,
        text=True,
        cwd=ROOT,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    report = {found["objective"]: found for found in map(json.loads, lines)}
    names = {"ours", "peer_packed", "peer_padded", "peer_padded_by_length"}
    for objective, wanted in (("mlm", names | {"peer_packed_sparse"}), ("clm", names)):
        rates = {k: v for k, v in report[objective].items() if k.endswith("_tokens_per_s")}
        assert set(rates) == {f"{name}_tokens_per_s" for name in wanted}
        assert all(rate > 0.0 for rate in rates.values())
        assert set(report[objective]["path_cost"]) == set(PARTS)
