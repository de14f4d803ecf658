"""Order of the ledger's records while a checkpoint is pending, or the disk refuses them."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.checkpoint import RunState
from megatron_ettin.data.orders import open_order
from megatron_ettin.order import OrderSpec
from megatron_ettin.order.ledger import Kind, Ledger, LedgerWriter
from megatron_ettin.order.row_loss_writer import RowLossWriter
from megatron_ettin.order.row_losses import HEADER_BYTES, RowLossReader, RowState, trained_entries
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


def test_losses_come_before_the_records_and_a_checkpoint_binds_them(
    tmp_path: Path, spec: OrderSpec
) -> None:
    """Those of later steps wait with their records; a disk that refuses one lets both wait."""
    writer = LedgerWriter.open(tmp_path)
    losses = RowLossWriter.open(tmp_path, 0, fork=None, is_on=True)
    assert losses is not None
    recorder = Recorder(
        writer, {"config_sha256": "0"}, spec, RunState(), is_amended=False, losses=losses
    )

    def record(step: int, g: int) -> RunState:
        taken = StepRange(step=step, phase=0, g_begin=g, g_end=g + 2, tokens=10)
        entries = trained_entries(np.full(2, 0.5 + g), np.full(2, 10.0))
        recorder.record_steps([taken], np.ones((1, LANES), dtype=np.uint64), entries)
        return RunState(step=step, g=g + 2, consumed_tokens=10 * step)

    def rows() -> int:
        return RowLossReader.open(losses.path).end_g

    saved = record(1, 0)
    recorder.record_skip(saved, 0, 5)
    saved = RunState(step=1, g=5, consumed_tokens=10)
    recorder.hold()
    later = record(2, 5)
    assert (rows(), kinds(tmp_path)[-1]) == (5, ("SKIP", 1))
    recorder.record_checkpoint(saved, "step_00000001", "0" * 64)
    recorder.release()
    with limited_files(1):
        last = record(3, 7)
    assert (rows(), kinds(tmp_path)[-1]) == (7, ("STEP", 2))
    recorder.record_checkpoint(last, "step_00000003", "0" * 64)
    assert (rows(), later.g, kinds(tmp_path)[-2:]) == (9, 7, [("STEP", 3), ("CHECKPOINT", 3)])
    content = losses.path.read_bytes()[HEADER_BYTES:]
    bound = [e["row_losses"] for e in Ledger.read(tmp_path).events.values() if "row_losses" in e]
    assert bound == [
        {"g_begin": b, "g_end": e, "sha256": hashlib.sha256(content[8 * b : 8 * e]).hexdigest()}
        for b, e in ((0, 5), (5, 9))
    ]
    states = RowLossReader.open(losses.path).read(0, 9).states.tolist()
    trained, left_out = RowState.TRAINED, RowState.LEFT_OUT
    assert states == [trained] * 2 + [left_out] * 3 + [trained] * 4
    recorder.close()
