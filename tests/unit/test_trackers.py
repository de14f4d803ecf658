"""W&B and TensorBoard: what they get, and that a resumed run continues where it was."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import RunConfig
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.training import start_checks
from megatron_ettin.training.trackers import TensorBoardTracker, WandbTracker, open_trackers
from tests.conftest import TinyCorpus
from tests.runs import tiny_config
from tests.wandb_logs import logged_config, logged_ids, logged_losses

ORDER_ID = "61a34623582b"
LOSSES = {1: 5.0, 2: 4.5, 3: 4.25, 4: 4.125}


@pytest.fixture
def config(tiny_corpus: TinyCorpus, tmp_path: Path) -> RunConfig:
    return tiny_config(tiny_corpus, tmp_path / "run", logging={"wandb": True})


def log_steps(tracker: WandbTracker | TensorBoardTracker, steps: list[int]) -> None:
    for step in steps:
        tracker.log("train", {"step": step, "loss": LOSSES[step]}, step)
    tracker.close(failed=False)


@pytest.mark.slow
def test_a_resumed_run_continues_its_wandb_run(config: RunConfig, tmp_path: Path) -> None:
    log_steps(WandbTracker(config, ORDER_ID, RunState()), [1, 2, 3])
    identity = RunFolder(tmp_path / "run").wandb_id.read_text().strip()
    log_steps(WandbTracker(config, ORDER_ID, RunState(step=2)), [3, 4])
    logs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert [logged_ids(log) for log in logs] == [{identity}] * len(logs)
    losses = [loss for log in logs for loss in logged_losses(log)]
    assert losses == [LOSSES[step] for step in (1, 2, 3, 3, 4)]
    # Fields of their own, that runs can be sorted by, and the order that they followed.
    for log in logs:
        found = logged_config(log)
        assert found["optimizer"]["lr"] == config.optimizer.lr
        assert found["phases"]["short"]["global_batch_size"] == 16
        assert found["objective"]["init_args"]["mask_rate"] == 0.3
        assert found["order_id"] == ORDER_ID
    # A run that begins anew in the folder, before any checkpoint, is another W&B run.
    WandbTracker(config, ORDER_ID, RunState()).close(failed=True)
    assert RunFolder(tmp_path / "run").wandb_id.read_text().strip() != identity


def test_the_environment_chooses_the_id_of_a_run_that_begins(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("wandb.init", lambda **settings: seen.append(settings))
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    WandbTracker(config, ORDER_ID, RunState())
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    WandbTracker(config, ORDER_ID, RunState(step=2))
    assert [settings["id"] for settings in seen] == ["mine", "mine"]
    assert {settings["resume"] for settings in seen} == {"allow"}


def test_no_flag_opens_nothing(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    assert open_trackers(tiny_config(tiny_corpus, tmp_path / "run"), ORDER_ID, RunState()) == []


def test_a_missing_tensorboard_is_named(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_corpus, tmp_path / "run", logging={"tensorboard": True})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    match = r"logging\.tensorboard: the package tensorboard is not installed"
    with pytest.raises(start_checks.StartError, match=match):
        start_checks.check_outputs(config)


def test_tensorboard_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torch's writer, which needs the package."""
    calls: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, log_dir: str, purge_step: int) -> None:
            calls.append(("open", log_dir, purge_step))

        def add_scalar(self, tag: str, value: float, global_step: int) -> None:
            calls.append((tag, value, global_step))

        def flush(self) -> None:
            calls.append(("flush",))

        def close(self) -> None:
            calls.append(("close",))

    stand_in = type("module", (), {"SummaryWriter": Writer})
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", stand_in)
    log_steps(TensorBoardTracker(RunFolder(tmp_path), RunState(step=2)), [3])
    assert calls == [
        ("open", str(tmp_path / "tensorboard"), 3),
        ("train/step", 3, 3),
        ("train/loss", 4.25, 3),
        ("flush",),
        ("close",),
    ]


def test_tensorboard_reads_its_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder(tmp_path)
    log_steps(TensorBoardTracker(folder, RunState()), [1, 2, 3])
    log_steps(TensorBoardTracker(folder, RunState(step=2)), [3, 4])
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert read == list(LOSSES.items())
