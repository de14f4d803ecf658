"""A run that loses checkpoints, or its whole folder, ends as if nothing had happened."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin import distributed
from megatron_ettin.checkpoint_files import CheckpointError
from megatron_ettin.config import HardwareConfig, parse_args
from megatron_ettin.evaluation.layouts import Curve
from megatron_ettin.order.ledger import Ledger, LedgerError
from megatron_ettin.order.ledger.lock import hold_ledger
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.verify import verify
from megatron_ettin.training import start_checks
from megatron_ettin.training.start_checks import StartError
from megatron_ettin.training.starting_checkpoint import choose_checkpoint
from tests.conftest import TinyCorpus
from tests.ranks import pretrain_main, started_ranks
from tests.training import RESUME, steps_saved, train_here

PHASES = [{"name": "short", "train_tokens": 12_000, "seq_length": 128, "global_batch_size": 8}]
SAVE_EVERY = "--checkpoint.save_every_tokens=3000"
NO_FALLBACK = "--checkpoint.fallback=false"


@dataclass(frozen=True)
class Whole:
    """A run that nothing happened to, with its copies in a second place."""

    arguments: list[str]
    """Configuration and times of saving, without the second place."""
    path: Path
    place: Path
    curve: Curve
    steps: list[int]

    def copy(self, folder: Path) -> RunFolder:
        """Copy the run's folder."""
        shutil.copytree(self.path, folder)
        return RunFolder(folder)

    def require_equal(self, run: RunFolder, curve: Curve) -> None:
        """Compare another run's losses and last weights, and verify its record and its files."""
        assert curve.losses == self.curve.losses
        assert weights_sha256(run) == weights_sha256(RunFolder(self.path))
        answer = verify(run.path, order=False, tokens=False, weights=True)
        assert answer.passed, answer.faults
        assert not list(run.checkpoints.glob("*.unfinished"))


def weights_sha256(run: RunFolder) -> str:
    newest = run.newest_checkpoint()
    assert newest is not None
    files = json.loads((newest / "state.json").read_text())["files"]
    return str(files["__0_0.distcp"]["sha256"])


@pytest.fixture(scope="module")
def whole(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_corpus.write_config(folder / "run.yaml", phases=PHASES, objective="MaskedLM")
    arguments, place = [f"--config={config}", SAVE_EVERY], folder / "place"
    curve = train_here([*arguments, f"--checkpoint.copy_to={place}"], folder / "run")
    saved = steps_saved(folder / "run")
    assert len(saved) == 4
    return Whole(arguments, folder / "run", place, curve, saved)


def choose(whole: Whole, run: RunFolder, *options: str) -> None:
    """Do what a start does before it opens the corpora; needs process groups."""
    config = parse_args([*whole.arguments, f"--run_dir={run.path}", *options])
    start_checks.check_outputs(config)
    choose_checkpoint(config)


@pytest.fixture
def groups() -> Iterator[None]:
    with distributed.process_groups(HardwareConfig()):
        yield


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)  # a newline at an end is nothing


DAMAGES: list[Callable[[Path], Any]] = [flip_bit, cut, Path.unlink]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.usefixtures("groups")
def test_any_damage_to_any_file_leads_to_the_checkpoint_before(
    whole: Whole, tmp_path: Path, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    run = whole.copy(tmp_path / "run")
    *_, before, last = whole.steps
    newest = run.checkpoint(last)
    aside = newest.with_name(newest.name + ".damaged")
    paths = [path for path in sorted(newest.iterdir()) if path.stat().st_size]
    assert {"state.json", ".metadata", "__0_0.distcp", "model.json", "config.yaml"} <= {
        path.name for path in paths
    }
    for path in paths:
        content = path.read_bytes()
        damage(path)
        named = newest if path.name == "state.json" else path
        with pytest.raises((CheckpointError, StartError), match=str(named)):
            choose(whole, run, RESUME, NO_FALLBACK)
        assert newest.is_dir(), "without fallback nothing is renamed"
        caplog.clear()
        choose(whole, run, RESUME)
        assert f"damaged: {named}" in caplog.text
        assert run.newest_checkpoint() == run.checkpoint(before)
        assert run.set_aside_checkpoints() == [aside]
        aside.rename(newest)
        path.write_bytes(content)
    choose(whole, run, RESUME)
    assert run.newest_checkpoint() == newest


@pytest.mark.slow
@pytest.mark.usefixtures("groups")
def test_every_bit_of_a_state_counts(whole: Whole, tmp_path: Path) -> None:
    """Flip a bit of some bytes; no other file binds all values of the state."""
    run = whole.copy(tmp_path / "run")
    newest = run.checkpoint(whole.steps[-1])
    content = (newest / "state.json").read_bytes()
    for place in range(0, len(content), len(content) // 16):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (newest / "state.json").write_bytes(damaged)
        choose(whole, run, RESUME)
        assert run.newest_checkpoint() == run.checkpoint(whole.steps[-2]), f"byte {place}"
        run.set_aside_checkpoints()[0].rename(newest)


@pytest.mark.slow
def test_a_run_goes_on_from_the_one_before(whole: Whole, tmp_path: Path) -> None:
    """Two damaged ones, an incomplete one and an unfinished one: the run ends as the whole one."""
    run = whole.copy(tmp_path / "run")
    first, second, third, last = whole.steps
    flip_bit(run.checkpoint(second) / "__0_0.distcp")
    (run.checkpoint(third) / "state.json").unlink()
    cut(run.checkpoint(last) / ".metadata")
    run.checkpoint(last + 1).with_suffix(".unfinished").mkdir()
    curve = train_here([*whole.arguments, RESUME], run.path)
    named = [f"step_{step:08d}.damaged" for step in (second, third, last)]
    assert [path.name for path in run.set_aside_checkpoints()] == named
    whole.require_equal(run, curve)
    ledger = Ledger.read(run.ledger)
    assert len(ledger.forks()) == 1
    resumed = [payload for payload in ledger.events.values() if payload.get("set_aside")]
    assert [payload["set_aside"] for payload in resumed] == [named]
    assert resumed[0]["from_checkpoint"] == f"step_{first:08d}"
    notes = verify(run.path, order=False, tokens=False).notes
    assert any("later checkpoints were damaged" in note and named[-1] in note for note in notes)
    # The same step may be damaged again.
    flip_bit(run.checkpoint(last) / "model.json")
    with distributed.process_groups(HardwareConfig()):
        choose(whole, run, RESUME)
    assert run.checkpoint(last).with_suffix(".damaged-2").is_dir()


@pytest.mark.slow
@pytest.mark.usefixtures("groups")
def test_a_run_without_a_whole_checkpoint_is_refused(whole: Whole, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "run")
    for step in whole.steps:
        flip_bit(run.checkpoint(step) / "__0_0.distcp")
    before = sorted(run.checkpoints.iterdir())
    newest = run.checkpoint(whole.steps[-1])
    with pytest.raises(CheckpointError, match=rf"{newest}/__0_0.*nor is any of 3 earlier ones"):
        choose(whole, run, RESUME)
    assert sorted(run.checkpoints.iterdir()) == before


@pytest.mark.slow
@pytest.mark.usefixtures("groups")
def test_nothing_is_renamed_while_another_process_writes(whole: Whole, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "run")
    flip_bit(run.checkpoint(whole.steps[-1]) / "__0_0.distcp")
    with hold_ledger(run.ledger), pytest.raises(LedgerError, match="is writing this ledger"):
        choose(whole, run, RESUME)
    assert run.set_aside_checkpoints() == []


@pytest.mark.slow
def test_two_ranks_agree_on_the_one_before(whole: Whole, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "run")
    flip_bit(run.checkpoint(whole.steps[-1]) / "__0_0.distcp")
    arguments = [*whole.arguments, RESUME, f"--run_dir={run.path}", "--logging.log_every_steps=1"]
    with started_ranks(pretrain_main, [arguments], ranks=2, logs=tmp_path) as processes:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0]
    assert len(run.set_aside_checkpoints()) == 1
    assert verify(run.path, order=False, tokens=False, weights=True).passed


@pytest.mark.slow
def test_what_a_run_removes_is_told_from_what_is_lost(whole: Whole, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    curve = train_here([*whole.arguments, "--checkpoint.keep.last=2"], run.path)
    assert steps_saved(run.path) == whole.steps[-2:]
    whole.require_equal(run, curve)
    assert run.removed_checkpoints() == {f"step_{step:08d}" for step in whole.steps[:2]}
    notes = verify(run.path, order=False, tokens=False).notes
    assert any("2 of 4 checkpoints were removed by checkpoint.keep" in note for note in notes)
    assert not any("are gone" in note for note in notes)
    shutil.rmtree(run.checkpoint(whole.steps[-2]))
    notes = verify(run.path, order=False, tokens=False).notes
    assert any(f"1 of 4 checkpoints are gone: step_{whole.steps[-2]:08d}" in n for n in notes)


@pytest.mark.slow
def test_a_run_whose_folder_is_gone_goes_on_from_its_copies(whole: Whole, tmp_path: Path) -> None:
    place, run = tmp_path / "place", RunFolder(tmp_path / "run")
    shutil.copytree(whole.place, place)
    for step in whole.steps[2:]:  # the copies that were not made when the machine went away
        shutil.rmtree(place / "checkpoints" / f"step_{step:08d}")
    copy_to = f"--checkpoint.copy_to={place}"
    with pytest.raises(StartError, match=r"holds checkpoints of a run already: give --checkpoint"):
        train_here([*whole.arguments, copy_to], run.path)
    curve = train_here([*whole.arguments, RESUME, copy_to], run.path)
    whole.require_equal(run, curve)
    assert steps_saved(run.path) == whole.steps[1:]
    ledger = Ledger.read(run.ledger)
    assert [point.step for point in ledger.checkpoints()] == whole.steps
    assert sorted(path.name for path in (place / "checkpoints").iterdir()) == [
        f"step_{step:08d}" for step in whole.steps
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("groups")
def test_a_copy_takes_the_place_of_a_damaged_checkpoint(whole: Whole, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "run")
    records = (run.ledger / "records.led").read_bytes()
    newest = run.checkpoint(whole.steps[-1])
    flip_bit(newest / "__0_0.distcp")
    choose(whole, run, RESUME, f"--checkpoint.copy_to={whole.place}")
    assert run.newest_checkpoint() == newest
    assert weights_sha256(run) == weights_sha256(RunFolder(whole.path))
    assert (run.ledger / "records.led").read_bytes() == records
    assert [path.name for path in run.set_aside_checkpoints()] == [f"{newest.name}.damaged"]


@pytest.mark.slow
def test_copies_of_undone_steps_are_passed_over(
    whole: Whole, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Go back by hand, without a second place, and then on with it."""
    run = whole.copy(tmp_path / "run")
    place = tmp_path / "place"
    shutil.copytree(whole.place, place)
    for step in whole.steps[1:]:
        shutil.rmtree(run.checkpoint(step))
    train_here([*whole.arguments, RESUME], run.path)
    shutil.rmtree(run.checkpoint(whole.steps[-1]))
    with caplog.at_level(logging.WARNING), distributed.process_groups(HardwareConfig()):
        choose(whole, run, RESUME, f"--checkpoint.copy_to={place}")
    assert "has records that are not those of the copied checkpoint" in caplog.text
    assert run.newest_checkpoint() == run.checkpoint(whole.steps[-2])


@pytest.mark.slow
@pytest.mark.usefixtures("groups")
def test_a_place_that_fails_stops_only_a_run_without_checkpoints(
    whole: Whole, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = whole.copy(tmp_path / "run")
    nowhere = "--checkpoint.copy_to=nothing-like-this://bucket/run"
    choose(whole, run, RESUME, nowhere)
    assert "nothing-like-this://bucket/run" in caplog.text
    assert run.newest_checkpoint() == run.checkpoint(whole.steps[-1])
    with pytest.raises(StartError, match=r"run_dir has no checkpoint, so this place must answer"):
        choose(whole, RunFolder(tmp_path / "other"), RESUME, nowhere)
