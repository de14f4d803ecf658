"""Steps that go wrong: left out as if `data.skip_rows` had named their rows, on every layout."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ettin.evaluation.layouts import LAYOUTS, read_curve
from megatron_ettin.order.ledger import Ledger
from megatron_ettin.order.ledger.format import RECORD_BYTES
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.recorded_run import open_run
from megatron_ettin.queries.skips import SkippedStretch, list_pieces, list_skips
from megatron_ettin.queries.verify import verify
from megatron_ettin.training import loop
from megatron_ettin.training.recorder import Recorder
from tests.conftest import TinyCorpus
from tests.independent.program import rebuild
from tests.poison import Factors, poisoned_main, poisoned_step
from tests.ranks import run_job, run_ranks, started_ranks
from tests.training import RESUME, cut_off, train_here

pytestmark = pytest.mark.slow

NAN = math.nan
PHASES = [
    {
        "name": "short",
        "train_tokens": 10_000,
        "seq_length": 128,
        "global_batch_size": 8,
        # The cuts of this phase depend on the tokens that count.
        "batch_ramp_start": 3,
        "batch_ramp_tokens": 8_000,
    },
    {"name": "long", "train_tokens": 4_000, "seq_length": 256, "global_batch_size": 4},
]


@pytest.fixture(scope="module")
def config(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_corpus.write_config(
        tmp_path_factory.mktemp("trouble") / "run.yaml",
        objective="MaskedLM",
        phases=PHASES,
        checkpoint={"save_every_tokens": 4_000},
    )


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """Train the run without a fault."""
    run = config.parent / "whole"
    train(config, run)
    return run


def train(config: Path, run: Path, *options: str, factors: Factors | None = None) -> list[float]:
    """Train in this process, with a fault or without; return the losses of the steps."""
    with pytest.MonkeyPatch.context() as patch:
        if factors is not None:
            patch.setattr(loop, "forward_step", poisoned_step(factors))
        return train_here([f"--config={config}", *options], run).losses


def steps(run: Path) -> list[tuple[int, int]]:
    """Return the rows of each step."""
    return [(int(r["g_begin"]), int(r["g_end"])) for r in Ledger.read(run / "ledger").steps]


def saved_rows(run: Path) -> list[int]:
    """Return the row at which each checkpoint was saved."""
    return [point.g for point in Ledger.read(run / "ledger").checkpoints()]


def bits(run: Path) -> dict[str, Any]:
    """Return what decides how a run goes on: weights, moments, and the state's numbers."""
    newest = RunFolder(run).newest_checkpoint()
    assert newest is not None
    state = json.loads((newest / "state.json").read_text())
    shards = {name: file for name, file in state["files"].items() if name.endswith(".distcp")}
    assert shards
    names = ("g", "step", "consumed_tokens", "phase_tokens", "order_digest", "token_digest")
    return {"name": newest.name, **shards, **{name: state[name] for name in names}}


def with_skipped(config: Path, ranges: list[tuple[int, int]], folder: Path) -> Path:
    """Write the same run with `data.skip_rows`, from which the reference is trained."""
    document = yaml.safe_load(config.read_text())
    document["data"]["skip_rows"] = [list(rows) for rows in ranges]
    path = folder / "skips.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def rows_of(skips: list[SkippedStretch]) -> list[tuple[int, int]]:
    return [(skip.g_begin, skip.g_end) for skip in skips if skip.fork is None]


def check_equals_reference(config: Path, run: Path, folder: Path) -> None:
    """Compare with a run of the same seed that is told which rows to leave out."""
    reference = folder / "reference"
    told = with_skipped(config, rows_of(list_skips(run).skips), folder)
    assert train(told, reference) == read_curve(run).losses
    assert steps(run) == steps(reference)
    assert bits(run) == bits(reference)


def check_record(run: Path) -> None:
    verification = verify(run)
    assert verification.passed, verification.faults
    answer = rebuild(run)
    assert answer.startswith("PASS "), answer
    reported = [
        line for line in RunFolder(run).read_metrics() if line["kind"] in ("skip", "rewind")
    ]
    assert [tuple(line["rows"]) for line in reported] == rows_of(list_skips(run).skips)


def test_a_skipped_step_leaves_no_trace(config: Path, whole: Path, tmp_path: Path) -> None:
    order = json.loads((whole / "order.json").read_text())
    end = order["phases"][0]["num_rows"]
    # The first step of the run, one in the ramp, and the last one of the phase.
    factors = {0: NAN, steps(whole)[3][0] + 1: NAN, end - 1: NAN}
    run = tmp_path / "run"
    train(config, run, "--trouble.on_nan=skip", factors=factors)
    skips = list_skips(run).skips
    assert [(skip.fork, skip.reason, skip.action) for skip in skips] == [
        (None, "trouble.on_nan", "skip")
    ] * 3
    assert skips[0].g_begin == 0
    assert skips[2].g_end == end
    assert {(skip.loss, skip.gradient_norm) for skip in skips} == {(None, None)}
    check_equals_reference(config, run, tmp_path)
    check_record(run)


def test_a_rewind_leaves_out_the_steps_before_too(
    config: Path, whole: Path, tmp_path: Path
) -> None:
    """One before there is a checkpoint, one in the second phase, cut short by its checkpoint."""
    before, cuts = saved_rows(whole), steps(whole)
    early = [cut for cut in cuts if cut[1] < before[0]]
    assert len(early) > 3
    bad = early[3]
    run = tmp_path / "run"
    options = ("--trouble.on_nan=rewind", "--trouble.rewind_steps=3")
    order = json.loads((whole / "order.json").read_text())
    start = order["phases"][1]["start_g"]
    factors = {bad[0]: NAN, start + 4: NAN}
    train(config, run, *options, factors=factors)
    skips = list_skips(run).skips
    assert rows_of(skips) == [(early[1][0], bad[1]), (start, start + 8)]
    pieces = list_pieces(open_run(run), skips)
    assert {piece.g for piece in pieces} == {*range(early[1][0], bad[1]), *range(start, start + 8)}
    assert [skip.fork is None for skip in skips] == [True, True, False, False]
    assert sorted((s.g_begin, s.g_end) for s in skips[2:]) == [bad, (start + 4, start + 8)]
    assert len(list((run / "ledger" / "forks").glob("*.led"))) == 2
    check_equals_reference(config, run, tmp_path)
    check_record(run)


def killed_main(arguments: list[str], factors: Factors) -> None:
    """Train as a rank that is killed when its decision is durable, before anything follows."""
    record_skip = Recorder.record_skip

    def record_and_die(recorder: Recorder, *given: Any) -> None:
        record_skip(recorder, *given)
        os.kill(os.getpid(), signal.SIGKILL)

    Recorder.record_skip = record_and_die  # type: ignore[method-assign]
    poisoned_main(arguments, factors)


@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_a_kill_after_the_decision_undoes_nothing(
    action: str, config: Path, whole: Path, tmp_path: Path
) -> None:
    """The resumed run has no fault, and leaves out the rows all the same."""
    bad = next(cut for cut in steps(whole)[2:] if cut[0] > saved_rows(whole)[0])
    run = tmp_path / "run"
    options = [f"--config={config}", f"--run_dir={run}", "--logging.log_every_steps=1"]
    options += [f"--trouble.on_nan={action}", "--trouble.rewind_steps=2"]
    with started_ranks(killed_main, [options, {bad[0]: NAN}], ranks=1, logs=tmp_path) as ranks:
        ranks[0].join(240)
        assert ranks[0].exitcode == -signal.SIGKILL, (tmp_path / "rank0.log").read_text()
    train(config, run, RESUME)
    skips = list_skips(run).skips
    assert {skip.action for skip in skips} == {action}
    assert [(skip.g_begin, skip.g_end) for skip in skips if skip.fork] == [bad]
    assert rows_of(skips)[0][1] == bad[1]
    check_equals_reference(config, run, tmp_path)
    check_record(run)


def forget_after(run: Path, g: int) -> None:
    """Cut a ledger after the checkpoint at row `g`, as if what came later had not been written."""
    ledger = Ledger.read(run / "ledger")
    head = next(point.head for point in ledger.checkpoints() if point.g == g)
    events = sum(seq <= head.seq for seq in ledger.events)
    lines = (run / "ledger" / "events.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger" / "events.jsonl").write_bytes(b"".join(lines[:events]))
    os.truncate(run / "ledger" / "records.led", (head.seq + 1) * RECORD_BYTES)


SPIKE = ["--trouble.on_spike=skip", "--trouble.window_steps=8", "--trouble.spike_z=20"]


def test_a_resumed_run_finds_the_same_spike(config: Path, whole: Path, tmp_path: Path) -> None:
    """The window of the losses reaches back before the checkpoint."""
    saved = saved_rows(whole)[1]
    bad = next(cut for cut in steps(whole) if cut[0] > saved)
    assert sum(saved <= begin < bad[0] for begin, _ in steps(whole)) < 8
    run = tmp_path / "run"
    factors = {bad[0]: 30.0, 1: 30.0}  # nothing is a spike in the first step
    train(config, run, *SPIKE, factors=factors)
    (skip,) = list_skips(run).skips
    assert (skip.reason, skip.g_begin, skip.g_end) == ("trouble.on_spike", *bad)
    assert skip.z is not None
    assert skip.z >= 20.0
    check_record(run)
    resumed = cut_off(run, tmp_path / "resumed", keep=2)
    forget_after(resumed, saved)
    train(config, resumed, *SPIKE, RESUME, factors=factors)
    assert bits(resumed) == bits(run)
    assert rows_of(list_skips(resumed).skips) == [bad]


def diverge(config: Path, run: Path, *options: str) -> str:
    """Train in a process of its own to the end that divergence makes; return its message."""
    arguments = [f"--config={config}", f"--run_dir={run}", *options]
    code, output = run_job(arguments, ranks=1, logs=config.parent, deadline_seconds=240)
    assert code == 1, output
    message: str = output.partition("error: ")[2]
    return message


def test_a_run_that_goes_wrong_for_good_ends(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--optimizer.lr=1e30", "--optimizer.warmup_tokens=0", "--trouble.on_nan=skip")
    limit = "--trouble.max_interventions=3"
    message = diverge(config, run, *options, limit)
    assert "no more, for trouble.max_interventions is 3" in message
    assert message.count("trouble.on_nan (skip) at step 2: ") == 4, message
    assert len(rows_of(list_skips(run).skips)) == 3
    # The decisions of the earlier session count, and their rows are not tried again.
    message = diverge(config, run, *options, limit, RESUME)
    assert message.count("trouble.on_nan (skip) at step 2: ") == 4
    assert list_skips(run).interventions == 3
    message = diverge(config, tmp_path / "stop", *options[:2], "--trouble.on_spike=skip")
    assert re.search("the loss is nan, .* at step 2 .* trouble.on_nan is stop", message)


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_ranks_decide_alike(layout: str, config: Path, whole: Path, tmp_path: Path) -> None:
    """A fault that one rank meets is left out by all, and the rest is as on one process."""
    saved = saved_rows(whole)
    bad = next(cut for cut in steps(whole) if cut[0] > saved[0])
    spike = next(cut for cut in steps(whole) if cut[0] > saved[1])
    factors = {bad[0]: NAN, spike[0]: 30.0}
    options = ["--trouble.on_nan=rewind", "--trouble.rewind_steps=2", *SPIKE]
    train(config, tmp_path / "one", *options, factors=factors)
    run = tmp_path / layout
    arguments = [f"--config={config}", f"--run_dir={run}", "--logging.log_every_steps=1"]
    arguments += [*options, *LAYOUTS[layout].arguments()]
    run_ranks(poisoned_main, [arguments, factors], ranks=2, logs=tmp_path, deadline_seconds=400.0)
    one, two = list_skips(tmp_path / "one").skips, list_skips(run).skips
    assert [(skip.action, skip.reason) for skip in one if skip.fork is None] == [
        ("rewind", "trouble.on_nan"),
        ("skip", "trouble.on_spike"),
    ]
    assert rows_of(two) == rows_of(one)
    assert rows_of(one)[0][1] == bad[1]
    curves = read_curve(tmp_path / "one"), read_curve(run)
    assert curves[1].largest_relative_difference(curves[0]) <= 1e-5
    assert curves[1].token_digest == curves[0].token_digest
    assert steps(run) == steps(tmp_path / "one")
    check_record(run)


def test_a_line_about_rows_that_were_not_left_out_is_a_fault(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    line = {"kind": "skip", "step": 3, "phase": "short", "tokens": 1, "rows": [9, 12]}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**line, "reason": "trouble.on_nan"}) + "\n")
    (fault,) = verify(run).faults
    assert "rows [9, 12) left out after step 3: no such SKIP record" in fault.what
