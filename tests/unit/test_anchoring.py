"""Heads are anchored while a run trains, and no place can stop it."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import LoggingConfig
from megatron_ettin.data.anchor import Anchor
from megatron_ettin.data.orders import open_order
from megatron_ettin.order import OrderSpec
from megatron_ettin.order.ledger import Head, Ledger, LedgerWriter
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.training import anchoring
from megatron_ettin.training.anchoring import Anchoring, open_anchoring
from megatron_ettin.training.preparation import LANES, StepRange
from megatron_ettin.training.recorder import Recorder
from megatron_ettin.training.start_checks import StartError
from tests.conftest import TinyCorpus
from tests.runs import tiny_config


@pytest.fixture(scope="module")
def spec(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> OrderSpec:
    return open_order(tiny_config(tiny_corpus, tmp_path_factory.mktemp("run") / "run")).spec


def settings(tmp_path: Path, every_seconds: float = 1e-9) -> LoggingConfig:
    return LoggingConfig(anchor=str(tmp_path / "anchor"), anchor_every_seconds=every_seconds)


def recorder_of(run: RunFolder, spec: OrderSpec, given: LoggingConfig) -> Recorder:
    writer = LedgerWriter.open(run.ledger)
    anchored = open_anchoring(given, run)
    return Recorder(
        writer, {"config_sha256": "0"}, spec, RunState(), is_amended=False, anchoring=anchored
    )


def record_step(recorder: Recorder, step: int) -> RunState:
    """Record step `step`, of one row; return the state after it."""
    taken = StepRange(step=step, phase=0, g_begin=step - 1, g_end=step, tokens=10)
    recorder.record_steps([taken], np.ones((1, LANES), dtype=np.uint64))
    return RunState(step=step, g=step, consumed_tokens=10 * step)


def anchored(tmp_path: Path) -> list[Head]:
    return [entry.head for entry in Anchor(str(tmp_path / "anchor")).heads()[0]]


def heads_of(run: RunFolder) -> list[Head]:
    return [
        Head(int(record["seq"]), record["chain"].tobytes().hex())
        for record in Ledger.read(run.ledger).records
    ]


def test_each_report_each_checkpoint_and_the_end_are_anchored(
    tmp_path: Path, spec: OrderSpec
) -> None:
    run = RunFolder(tmp_path / "run")
    recorder = recorder_of(run, spec, settings(tmp_path))
    record_step(recorder, 1)
    saved = record_step(recorder, 2)
    saved = recorder.record_checkpoint(saved, "step_00000002", "0" * 64)
    recorder.record_end(saved)
    _, *after_start = heads_of(run)
    assert anchored(tmp_path) == after_start


def test_between_two_heads_lies_the_interval(tmp_path: Path, spec: OrderSpec) -> None:
    """Only the first report, the checkpoint and the end come before the interval is over."""
    run = RunFolder(tmp_path / "run")
    recorder = recorder_of(run, spec, settings(tmp_path, every_seconds=3600.0))
    for step in (1, 2, 3):
        state = record_step(recorder, step)
    state = recorder.record_checkpoint(state, "step_00000003", "0" * 64)
    recorder.record_end(state)
    heads = heads_of(run)
    assert anchored(tmp_path) == [heads[1], heads[4], heads[5]]


def test_a_place_that_fails_stops_no_run_and_gets_the_heads_later(
    tmp_path: Path, spec: OrderSpec, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path / "run")
    recorder = recorder_of(run, spec, settings(tmp_path))
    (tmp_path / "anchor").write_text("a file where the folder should be")
    record_step(recorder, 1)
    wait_for(lambda: "the run goes on, 1 heads wait" in caplog.text)
    (tmp_path / "anchor").unlink()
    state = record_step(recorder, 2)
    recorder.record_end(state)
    assert anchored(tmp_path) == heads_of(run)[1:]


def test_the_end_of_a_run_names_a_place_that_lacks_its_last_heads(
    tmp_path: Path, spec: OrderSpec, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path / "run")
    recorder = recorder_of(run, spec, settings(tmp_path))
    (tmp_path / "anchor").write_text("")
    recorder.record_end(record_step(recorder, 1))
    assert "the ledger's last heads are not anchored" in caplog.messages[-1]


@pytest.fixture
def hangs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make every anchor hang until the test ends, as a store may that never answers."""
    released = threading.Event()
    monkeypatch.setattr(Anchor, "add", lambda *_: released.wait())
    monkeypatch.setattr(anchoring, "END_SECONDS", 0.2)
    yield
    released.set()


@pytest.mark.usefixtures("hangs")
def test_a_place_that_hangs_holds_up_neither_a_step_nor_the_end(
    tmp_path: Path, spec: OrderSpec, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path / "run")
    recorder = recorder_of(run, spec, settings(tmp_path))
    begin = time.monotonic()
    for step in range(1, 20):
        state = record_step(recorder, step)
    recorder.record_end(state)
    assert time.monotonic() - begin < 30, "the run waited for the place"
    assert "the ledger's last heads are not anchored" in caplog.messages[-1]
    assert len(heads_of(run)) == 21


def test_a_start_refuses_another_runs_place_or_one_that_does_not_answer(
    tmp_path: Path, spec: OrderSpec
) -> None:
    given = settings(tmp_path)
    for name in ("first", "second"):
        recorder_of(RunFolder(tmp_path / name), spec, LoggingConfig()).close()
    first, second = (RunFolder(tmp_path / name) for name in ("first", "second"))
    recorder = recorder_of(first, spec, given)
    recorder.record_end(record_step(recorder, 1))
    again = open_anchoring(given, first)
    assert isinstance(again, Anchoring)
    again.close()
    with pytest.raises(StartError, match=r"logging\.anchor: .* holds heads of another run"):
        open_anchoring(given, second)
    with pytest.raises(StartError, match=r"logging\.anchor: nothing-like-this://"):
        open_anchoring(LoggingConfig(anchor="nothing-like-this://bucket/run"), first)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
