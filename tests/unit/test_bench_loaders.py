"""The comparison of loaders: its counts, its cases, and what it says of the loaders at hand.

Ours is compared with the slow reference of docs/order.md, sample by sample. Rivals whose packages
are missing are skipped.
"""

import hashlib
import importlib
import importlib.util
import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.loaders.cases import AXES, Axis, ResumeCase, RunSetting, draw_case
from benchmarks.loaders.contest import AT_HOME, RIVALS, read_outcomes, rival_class, run_cases
from benchmarks.loaders.loader_costs import measure_cost, write_text
from benchmarks.loaders.ours import OurLoader, open_order
from benchmarks.loaders.outcomes import DrawnSample, count_outcome
from benchmarks.loaders.resume import run_case
from benchmarks.loaders.rival import ROW_TOKENS, MadeUpText, Rival, RivalStream, RunPlan, identify
from benchmarks.loaders.summary import tally
from tests.native import reference

ROOT = Path(__file__).parents[2]
PACKAGES = {name: name for name in ("grain", "litdata", "streaming")}
PACKAGES["grain-iterators"] = "grain"


def require(name: str) -> None:
    """Skip the test if the package of a rival is missing; do not import it."""
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")


def samples(*documents: int, source: int = 0) -> list[DrawnSample]:
    return [DrawnSample(source, document) for document in documents]


@pytest.mark.parametrize(
    ("before", "after", "past", "expected"),
    [
        ((0, 1, 2), (3, 0), (2, 1, 0), (0, 0, 0)),  # an epoch of four, and one document more
        ((0, 1), (1, 3), (0, 1), (1, 1, 0)),  # 1 twice in an epoch, 2 never
        ((0, 1), (0, 1), (0, 1), (2, 2, 0)),  # began again
        ((0, 1), (3, 3), (0, 2), (1, 1, 1)),  # 3 twice, 2 never; and 1 was not what the past says
        ((0, 1, 2, 3), (0, 1, 1), (0, 1, 2, 3), (1, 0, 0)),  # 1 three times, where two are allowed
        ((0, 0, 1, 1), (2, 2, 3, 3), (0, 0, 1, 1), (0, 0, 0)),  # two epochs shuffled together
        ((), (), (), (0, 0, 0)),
    ],
)
def test_counts(
    before: Sequence[int], after: Sequence[int], past: Sequence[int], expected: tuple[int, ...]
) -> None:
    outcome = count_outcome([4], samples(*before), samples(*after), samples(*past))
    assert (outcome.repeated, outcome.lost, outcome.changed_past) == expected
    assert outcome.is_clean == (expected == (0, 0, 0))


def test_sources_are_counted_apart() -> None:
    web, books = samples(0, 1, 0), samples(0, 0, source=1)
    outcome = count_outcome([2, 2], web, books, web)
    assert (outcome.drawn, outcome.repeated, outcome.lost) == (5, 1, 1)


class Planted(Rival):
    """Documents in their order, with a fault after the restart."""

    def __init__(self, folder: Path, fault: str) -> None:
        super().__init__(folder)
        self.fault = fault

    def write(self, path: Path, rows: NDArray[np.uint16]) -> None:
        raise AssertionError("a planted fault needs no corpus")

    def write_text(self, path: Path, text: MadeUpText) -> None:
        raise AssertionError("a planted fault needs no corpus")

    def packed_batches(self, path: Path) -> Any:
        raise AssertionError("a planted fault needs no corpus")

    @staticmethod
    def versions() -> dict[str, str]:
        return {}

    def open(self, plan: RunPlan, state: Any | None) -> RivalStream:
        if state is not None and self.fault == "refuses":
            raise ValueError("the number of ranks differs")
        shift = {"repeats": -3, "skips": 3}.get(self.fault, 0) if state is not None else 0
        first = 1 if plan.earlier and self.fault == "forgets" else 0
        return PlantedSteps(plan, (state or 0) + shift, first, self.fault)


class PlantedSteps(RivalStream):
    def __init__(self, plan: RunPlan, number: int, first: int, fault: str) -> None:
        self.plan, self.number, self.first, self.fault = plan, number, first, fault

    def step(self) -> list[DrawnSample]:
        (size,) = self.plan.sizes
        if self.fault == "breaks" and self.plan.earlier and self.number >= 8:
            raise KeyError("worker 3")
        numbers = range(self.number, self.number + self.plan.present.batch)
        self.number = numbers.stop
        return samples(*((self.first + number) % size for number in numbers))

    def state(self) -> int:
        return self.number


@pytest.mark.parametrize(
    ("fault", "verdict", "expected"),
    [
        ("", "resumed", (0, 0, 0)),
        ("repeats", "resumed", (3, 3, 0)),
        ("skips", "resumed", (3, 3, 0)),
        ("forgets", "resumed", (1, 1, 1)),  # the new run is shifted by one document
        ("refuses", "refused", (0, 0, 0)),
        ("breaks", "failed", (0, 0, 0)),
    ],
)
def test_planted_fault_is_seen(
    tmp_path: Path, fault: str, verdict: str, expected: tuple[int, ...]
) -> None:
    setting = RunSetting(ranks=1, batch=4, weights=(1,), horizon=24)
    case = ResumeCase(sizes=(24,), before=setting, after=setting, stop_steps=1, seed=1)
    outcome = run_case(Planted(tmp_path, fault), case)
    assert outcome.verdict == verdict
    assert (outcome.repeated, outcome.lost, outcome.changed_past) == expected
    assert bool(outcome.message) == (verdict != "resumed")


@pytest.mark.parametrize("axis", AXES)
def test_case_changes_what_its_axis_says(axis: Axis) -> None:
    changed: Counter[str] = Counter()
    for number in range(200):
        case = draw_case(axis, number)
        assert case == draw_case(axis, number)
        assert 0 < case.consumed < min(case.before.horizon, case.after.horizon)
        before, after = vars(case.before), vars(case.after)
        changed.update(name for name in before if before[name] != after[name])
    every = {"ranks", "batch", "horizon", "weights"}
    expected = {"blend": {"weights"}, "all at once": every}.get(axis, {axis} & every)
    assert dict(changed) == dict.fromkeys(expected, 200)


def documented_samples(rival: OurLoader, plan: RunPlan) -> list[DrawnSample]:
    """Return the samples of a run by docs/order.md; a row of these corpora is a document."""
    found: list[DrawnSample] = []
    for phase in open_order(rival.corpora(plan.sizes), plan).spec.phases:
        table, _ = reference.blend_table([pool.quota for pool in phase.pools])
        for n in range(phase.num_rows):
            source = table[n % len(table)]
            size = plan.sizes[source]
            drawn = sum(sample.source == source for sample in found)
            epoch, index = divmod(drawn, size)
            name = f"source{source}:0:{size}:bfd:{ROW_TOKENS}:1"
            identity = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
            key = reference.counter_key(plan.seed, reference.PERMUTATION, [identity, epoch])
            found.append(DrawnSample(source, reference.permute(size, key, index)))
    return found


@pytest.mark.parametrize("axis", AXES)
def test_ours_delivers_what_the_document_says(tmp_path: Path, axis: Axis) -> None:
    rival = OurLoader(tmp_path)
    rival.prepare()
    for number in range(3):
        case = draw_case(axis, number)
        earlier = ((case.before, case.consumed),)
        plan = RunPlan(sizes=case.sizes, seed=case.seed, present=case.after, earlier=earlier)
        with closing(rival.open(plan, None)) as stream:
            found: list[DrawnSample] = []
            while len(found) < case.after.horizon:
                found += stream.step()
        expected = documented_samples(rival, plan)
        assert Counter(found) == Counter(expected)
        first = case.after.batch // case.after.ranks  # of rank 0
        assert found[:first] == expected[:first]
        outcome = run_case(rival, case)
        assert outcome.is_clean, (case, outcome)
        assert outcome.drawn == case.after.horizon


@pytest.mark.slow
def test_megatron_core_keeps_its_order_over_ranks_but_not_over_horizons(tmp_path: Path) -> None:
    run_cases("megatron-core", tmp_path, cases=10)
    assert logging.root.isEnabledFor(logging.CRITICAL), "other programs of this process log"
    tallies = tally(read_outcomes(tmp_path / "megatron-core.jsonl"))
    assert {axis: counts.cases for axis, counts in tallies.items()} == dict.fromkeys(AXES, 10)
    for axis in ("nothing", "ranks", "batch", "nothing, blended"):
        assert tallies[axis].with_changed_past == 0, axis
    assert tallies["nothing"].refused == tallies["ranks"].refused == 0
    assert tallies["horizon"].with_changed_past > 0
    assert tallies["horizon"].repeated > 0


@pytest.mark.filterwarnings("ignore::UserWarning:litdata")  # a buffer that torch must not write
@pytest.mark.parametrize("name", [name for name in RIVALS if name not in AT_HOME])
def test_rival_resumes_with_nothing_changed(tmp_path: Path, name: str) -> None:
    require(name)
    rival = rival_class(name)(tmp_path)
    rival.prepare()
    for number in range(3):
        outcome = run_case(rival, draw_case("nothing", number))
        assert outcome.is_clean, (number, outcome)


def test_streaming_is_shared_out_as_its_own_loader_does(tmp_path: Path) -> None:
    require("streaming")
    module = importlib.import_module("benchmarks.loaders.mosaic_streaming")
    rival = module.Streaming(tmp_path)
    rival.prepare()
    setting = RunSetting(ranks=1, batch=8, weights=(2, 3), horizon=100)
    plan = RunPlan(sizes=(24, 48), seed=5, present=setting)
    with closing(rival.open(plan, None)) as stream:
        ours = [stream.step() for _ in range(9)]
        state = stream.state()
    loader = module.StreamingDataLoader(
        module.open_dataset(rival.corpora(plan.sizes), plan), batch_size=setting.batch
    )
    theirs = [list(identify(batch["tokens"])) for batch in loader]
    assert ours == theirs
    assert state == loader.state_dict()


def test_cases_that_were_run_are_not_run_again(tmp_path: Path) -> None:
    run_cases("ours", tmp_path, cases=1)
    path = tmp_path / "ours.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == len(AXES)
    kept = "\n".join(lines[:-1])
    path.write_text(f"{kept}\n{lines[-1][:20]}\n")  # the last line was cut off
    run_cases("ours", tmp_path, cases=1)
    assert path.read_text() == f"{kept}\n{lines[-1][:20]}\n{lines[-1]}\n"
    assert set(json.loads(lines[0])) >= {"axis", "number", "verdict", "megatron-ettin"}


def test_costs_are_measured(tmp_path: Path) -> None:
    written = write_text(OurLoader, tmp_path / "text", megabytes=1)
    assert written["files_mb"] >= written["text_mb"] > 0.5
    cost = measure_cost(lambda: OurLoader, tmp_path / "text")
    assert cost["kept_mb"] > written["files_mb"]  # the plan
    assert cost["tokens_per_cpu_s"] > 0


@pytest.mark.slow
def test_tool_reports_and_goes_on(tmp_path: Path) -> None:
    options = ["--output", str(tmp_path), "--cases", "2", "--megabytes", "1", "--loaders", "ours"]
    tool = [sys.executable, str(ROOT / "tools" / "bench_loaders.py"), *options]
    first, second = (
        subprocess.run(tool, capture_output=True, check=True, text=True).stdout for _ in range(2)
    )
    assert first == second  # the second run measured nothing again
    assert (tmp_path / "loaders.md").read_text() in first
    figures = json.loads((tmp_path / "loaders.json").read_text())
    counts = figures["cases"]["ours"]
    assert {axis: each["clean"] for axis, each in counts.items()} == dict.fromkeys(AXES, 2)
    assert figures["costs"]["ours"]["tokens_per_cpu_s"] > 0
