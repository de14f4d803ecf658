"""Descriptions in a checkpoint folder, and errors about folders that are no checkpoint."""

import json
from pathlib import Path

import pytest

from megatron_ettin import checkpoint
from megatron_ettin.checkpoint import RunState
from megatron_ettin.checkpoint_files import CheckpointError
from megatron_ettin.order.ledger import Head
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.versions import package_versions


def make(run_dir: Path, name: str) -> Path:
    folder = run_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    state = {
        "versions": {},
        "files": {},
        "g": 7,
        "step": 2,
        "order_digest": [3, 4],
        "token_digest": [1, 2],
        "phase_ids": ["a"],
        "phase_ends": [9],
        "ledger_seq": 5,
        "ledger_chain": "ab",
    }
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).newest_checkpoint() is None
    for name in ("step_00000009", "step_00000100", "step_00000200.unfinished"):
        make(tmp_path, name)
    (tmp_path / "checkpoints" / "step_00000300").mkdir()
    assert RunFolder(tmp_path).newest_checkpoint() == RunFolder(tmp_path).checkpoint(100)


def test_a_state_reads_back(tmp_path: Path) -> None:
    folder = make(tmp_path, "step_00000002")
    state = checkpoint.read_state(folder)
    assert state == RunState(
        g=7,
        step=2,
        order_digest=(3, 4),
        token_digest=(1, 2),
        phase_ids=("a",),
        phase_ends=(9,),
        ledger_seq=5,
        ledger_chain="ab",
    )
    assert state.ledger_head == Head(5, "ab")
    assert RunState().ledger_head is None


@pytest.mark.parametrize("read", [checkpoint.read_model, checkpoint.read_config])
def test_a_folder_without_a_checkpoint_is_named(read: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no checkpoint here"):
        read(tmp_path / "nowhere")  # type: ignore[operator]


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path, "step_00000002")
    (folder / "state.json").write_text('{"g": 7,')
    with pytest.raises(CheckpointError, match=r"state\.json: unreadable"):
        checkpoint.read_state(folder)


def test_the_state_of_another_version_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path, "step_00000002")
    (folder / "state.json").write_text('{"g": 7, "versions": {}, "files": {}}')
    with pytest.raises(
        CheckpointError, match=r"state\.json: not the state of a run of this version"
    ):
        checkpoint.read_state(folder)


def test_versions_name_what_decides_numbers() -> None:
    found = package_versions()
    assert found["megatron-core"][0].isdigit()
    assert found["torch"].startswith("2.")
