"""Order of the ledger's records while a checkpoint is pending, or the disk refuses them."""

from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.checkpoint import RunState
from megatron_ettin.data.orders import open_order
from megatron_ettin.order import OrderSpec
from megatron_ettin.order.ledger import Kind, Ledger, LedgerWriter
from megatron_ettin.training.preparation import LANES, StepRange
from megatron_ettin.training.recorder import Recorder
from tests.conftest import TinyCorpus
from tests.disks import limited_files
from tests.runs import tiny_config


@pytest.fixture(scope="module")
def spec(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> OrderSpec:
    return open_order(tiny_config(tiny_corpus, tmp_path_factory.mktemp("run") / "run")).spec


def recorder_of(folder: Path, spec: OrderSpec) -> Recorder:
    writer = LedgerWriter.open(folder)
    return Recorder(writer, {"config_sha256": "0"}, spec, RunState(), is_amended=False)


def record_step(recorder: Recorder, step: int) -> RunState:
    """Record step `step`, of one row; return the state after it."""
    taken = StepRange(step=step, phase=0, g_begin=step - 1, g_end=step, tokens=10)
    recorder.record_steps([taken], np.ones((1, LANES), dtype=np.uint64))
    return RunState(step=step, g=step, consumed_tokens=10 * step)


def kinds(folder: Path) -> list[tuple[str, int]]:
    found = Ledger.read(folder).records
    return [(Kind(int(r["kind"])).name, int(r["step"])) for r in found]


def test_records_of_later_steps_follow_the_checkpoints(tmp_path: Path, spec: OrderSpec) -> None:
    recorder = recorder_of(tmp_path, spec)
    saved = record_step(recorder, 1)
    recorder.hold()
    later = record_step(recorder, 2)
    recorder.record_phase(later, 1, spec.phases[1])
    assert kinds(tmp_path) == [("START", 0), ("STEP", 1)]
    state = recorder.record_checkpoint(saved, "step_00000001", "0" * 64)
    assert kinds(tmp_path)[2:] == [("CHECKPOINT", 1)]
    assert state.ledger_head == Ledger.read(tmp_path).head
    recorder.release()
    assert kinds(tmp_path)[3:] == [("STEP", 2), ("PHASE", 2)]


def test_records_that_the_disk_refuses_come_later_in_their_order(
    tmp_path: Path, spec: OrderSpec, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = recorder_of(tmp_path, spec)
    record_step(recorder, 1)
    with limited_files(1):
        record_step(recorder, 2)
        saved = record_step(recorder, 3)
        recorder.hold()
        record_step(recorder, 4)
        with pytest.raises(OSError, match=r"records\.led"):
            recorder.record_checkpoint(saved, "step_00000003", "0" * 64)
    (said,) = caplog.messages
    assert "cannot be written (File too large): the run goes on, 1 writes wait in memory" in said
    assert kinds(tmp_path) == [("START", 0), ("STEP", 1)]
    recorder.record_checkpoint(saved, "step_00000003", "0" * 64)
    recorder.release()
    assert kinds(tmp_path)[2:] == [
        *(("STEP", 2), ("STEP", 3), ("CHECKPOINT", 3), ("STEP", 4)),
    ]
    recorder.close()


def test_a_failed_save_leaves_no_record(tmp_path: Path, spec: OrderSpec) -> None:
    recorder = recorder_of(tmp_path, spec)
    record_step(recorder, 1)
    recorder.hold()
    record_step(recorder, 2)
    recorder.release()
    assert kinds(tmp_path) == [("START", 0), ("STEP", 1), ("STEP", 2)]
