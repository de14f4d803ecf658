"""Which checkpoints stay; copies in a second place; what is removed, and when."""

import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig, KeepConfig
from megatron_ettin.order.run_folder import RunFolder, step_of
from megatron_ettin.publication import withdraw_folder
from megatron_ettin.training.keeper import Keeper, KeptCheckpoint, removable
from megatron_ettin.training.late_writes import LineFile
from megatron_ettin.training.second_place import SecondPlace, SecondPlaceError
from tests.conftest import TinyCorpus
from tests.runs import record_run, tiny_config
from tests.saved_checkpoints import publish_recorded

#: Steps of 3 tokens; the phases end with steps 4 and 9.
STEPS = [
    KeptCheckpoint(folder=Path(f"step_{n:08d}"), step=n, tokens=3 * n, ends_phase=n in (4, 9))
    for n in range(1, 11)
]
RULES = [
    (KeepConfig(), list(range(1, 11))),
    (KeepConfig(last=1), [4, 9, 10]),
    (KeepConfig(last=3), [4, 8, 9, 10]),
    (KeepConfig(last=100), list(range(1, 11))),
    # 10, 20 and 30 tokens are reached at 12, 21 and 30.
    (KeepConfig(every_tokens=10), [4, 7, 9, 10]),
    (KeepConfig(every_tokens=6), [2, 4, 6, 8, 9, 10]),
    (KeepConfig(every_tokens=1000), [4, 9, 10]),
    (KeepConfig(last=2, every_tokens=6), [2, 4, 6, 8, 9, 10]),
]


def steps(entries: Sequence[KeptCheckpoint]) -> list[int]:
    return [entry.step for entry in entries]


@pytest.mark.parametrize(("keep", "stay"), RULES)
def test_the_rule_is_the_same_after_each_save_as_at_the_end(
    keep: KeepConfig, stay: list[int]
) -> None:
    assert steps([e for e in STEPS if e not in removable(STEPS, keep)]) == stay
    kept: list[KeptCheckpoint] = []
    for entry in STEPS:
        kept.append(entry)
        gone = removable(kept, keep)
        assert entry not in gone
        kept = [other for other in kept if other not in gone]
    assert steps(kept) == stay


@pytest.mark.parametrize("name", ["last", "every_tokens"])
def test_a_rule_that_is_not_positive_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint\.keep\.{name}: 0 is not positive"):
        KeepConfig(**{name: 0})


@pytest.fixture
def run(tiny_corpus: TinyCorpus, tmp_path: Path) -> RunFolder:
    """Return a run that has ended, with four checkpoints; two of them end its phases."""
    run = RunFolder(record_run(tiny_config(tiny_corpus, tmp_path / "run"), save_steps=[2, 3]))
    assert len(publish_recorded(run)) == 4
    return run


def keep_once(run: RunFolder, keep: KeepConfig, place: str | None = None) -> set[str]:
    """Do what a publication and the end of a run do; return the names of what was removed."""
    second = None if place is None else SecondPlace(place)
    with (
        closing(LineFile(run.metrics)) as metrics,
        distributed.process_groups(HardwareConfig()),
        Keeper(run, keep, second, lambda line: metrics.append(json.dumps(line))) as keeper,
    ):
        keeper.note_published()
    return run.removed_checkpoints()


def steps_in(run: RunFolder) -> list[int]:
    return [step_of(path) or 0 for path in sorted(run.checkpoints.iterdir())]


def names(run: RunFolder, steps: Sequence[int]) -> set[str]:
    return {run.checkpoint(step).name for step in steps}


def test_what_need_not_stay_is_removed_whole(run: RunFolder) -> None:
    before = steps_in(run)
    assert keep_once(run, KeepConfig(last=1)) == names(run, before[:2])
    assert steps_in(run) == before[2:]


def test_a_removal_that_is_cut_off_leaves_no_checkpoint(run: RunFolder) -> None:
    first = run.complete_checkpoints()[0]
    withdrawn = withdraw_folder(first)
    assert withdrawn.is_dir()
    assert first not in run.complete_checkpoints()
    assert withdrawn not in run.complete_checkpoints()


def test_nothing_is_removed_before_it_is_copied(
    run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, place = steps_in(run), tmp_path / "place"
    place.write_text("")
    assert keep_once(run, KeepConfig(last=1), str(place)) == set()
    assert steps_in(run) == before
    assert f"{place}" in caplog.text
    assert "tried again after the next checkpoint" in caplog.text

    place.unlink()
    assert keep_once(run, KeepConfig(last=1), str(place)) == names(run, before[:2])
    assert steps_in(run) == before[2:]
    assert SecondPlace(str(place)).steps() == before


@pytest.mark.parametrize("scheme", ["", "file://", "memory:/"])
def test_a_copy_comes_back_with_the_run(run: RunFolder, tmp_path: Path, scheme: str) -> None:
    place = SecondPlace(f"{scheme}{tmp_path / 'place [1]'}")
    assert place.steps() == []
    assert place.owner() is None
    keep_once(run, KeepConfig(), place.address)
    copied = place.steps()
    assert copied == steps_in(run)
    again = RunFolder(tmp_path / "again")
    place.fetch(again, copied[-1])
    names = {path.relative_to(again.path) for path in again.path.rglob("*") if path.is_file()}
    for name in names - {run.ledger.relative_to(run.path) / "records.led"}:
        if name.suffix != ".jsonl":
            assert (again.path / name).read_bytes() == (run.path / name).read_bytes()
    ledger, whole = again.read_ledger(), run.read_ledger()
    assert ledger.checkpoints() == whole.checkpoints()
    assert len(ledger.records) == len(whole.records) - 1, "END comes after the last checkpoint"
    assert again.newest_checkpoint() == again.checkpoint(copied[-1])

    # An earlier one joins the ledger that is there.
    place.fetch(again, copied[0])
    assert len(again.read_ledger().records) == len(ledger.records)
    assert [step_of(path) for path in again.complete_checkpoints()] == [copied[0], copied[-1]]


def test_a_damaged_copy_is_not_taken(run: RunFolder, tmp_path: Path) -> None:
    place = SecondPlace(str(tmp_path / "place"))
    keep_once(run, KeepConfig(), place.address)
    step = place.steps()[-1]
    folder = tmp_path / "place" / "checkpoints" / run.checkpoint(step).name
    files = [path for path in (tmp_path / "place").rglob(f"*{folder.name}/**/*") if path.is_file()]
    assert {"state.json", "__0_0.distcp", "records.led", "files.json"} <= {p.name for p in files}
    for path in files:
        content = path.read_bytes()
        if not content:
            continue
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        again = RunFolder(tmp_path / "again")
        with pytest.raises((ValueError, SecondPlaceError), match=str(tmp_path / "place")):
            place.fetch(again, step)
        assert again.complete_checkpoints() == []
        path.write_bytes(content)
        shutil.rmtree(again.path, ignore_errors=True)
    (folder / "state.json").unlink()
    assert step not in place.steps()


def test_a_copy_that_comes_back_with_other_bytes_is_made_again(
    run: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = run.complete_checkpoints()[-1]
    shard = newest / "__0_0.distcp"
    content = shard.read_bytes()
    shard.write_bytes(content[::-1])
    keep_once(run, KeepConfig(), str(tmp_path / "place"))
    place = SecondPlace(str(tmp_path / "place"))
    assert place.steps() == steps_in(run)[:-1]
    assert "__0_0.distcp: has" in caplog.text
    shard.write_bytes(content)
    keep_once(run, KeepConfig(), place.address)
    assert place.steps() == steps_in(run)


def test_the_place_of_another_run_is_left_alone(
    run: RunFolder, tiny_corpus: TinyCorpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep_once(run, KeepConfig(), str(tmp_path / "place"))
    other = RunFolder(record_run(tiny_config(tiny_corpus, tmp_path / "other"), save_steps=[1]))
    publish_recorded(other)
    before = {path: path.read_bytes() for path in (tmp_path / "place").rglob("*") if path.is_file()}
    with caplog.at_level(logging.ERROR):
        keep_once(other, KeepConfig(), str(tmp_path / "place"))
    assert "holds checkpoints of another run: give another --checkpoint.copy_to" in caplog.text
    assert {p: p.read_bytes() for p in (tmp_path / "place").rglob("*") if p.is_file()} == before


def test_a_ledger_of_other_records_is_not_replaced(
    run: RunFolder, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    place = SecondPlace(str(tmp_path / "place"))
    keep_once(run, KeepConfig(), place.address)
    other = RunFolder(record_run(tiny_config(tiny_corpus, tmp_path / "other")))
    before = (other.ledger / "records.led").read_bytes()
    with pytest.raises(ValueError, match=r"other/ledger: has records that are not those of the"):
        place.fetch(other, place.steps()[-1])
    assert (other.ledger / "records.led").read_bytes() == before
    assert other.complete_checkpoints() == []
