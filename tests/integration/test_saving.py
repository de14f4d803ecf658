"""Saving beside the training: the same files, in the same order, whatever happens."""

import json
import re
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.checkpoint_files import check_files, read_files
from megatron_ettin.evaluation.layouts import LAYOUTS, Curve, read_curve
from megatron_ettin.order.ledger import Kind, Ledger
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.shard_saver import PendingShards
from tests.conftest import TinyCorpus
from tests.disks import (
    before_copies,
    before_shards,
    before_steps,
    may_mount,
    may_mount_images,
    replaced,
    small_files,
    train_on_failing_disk,
    train_on_small_disk,
    train_slowly,
    train_with_small_files,
)
from tests.ranks import run_ranks, started_ranks
from tests.training import RESUME, steps_saved, train_here

pytestmark = pytest.mark.slow

SAVE_EVERY = "--checkpoint.save_every_tokens=8000"
DEADLINE_SECONDS = 240.0


@pytest.fixture(scope="module")
def whole(
    tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], RunFolder, Curve]:
    """Return (arguments, run folder, curve) of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_corpus.write_config(folder / "run.yaml", objective="MaskedLM")
    arguments = [f"--config={config}", SAVE_EVERY]
    return arguments, RunFolder(folder / "run"), train_here(arguments, folder / "run")


def records(run: RunFolder) -> list[tuple[str, int]]:
    """Return kind and step of each record of the ledger, but for forks and resumes."""
    left_out = (Kind.FORK, Kind.RESUME)
    found = [(Kind(int(r["kind"])), int(r["step"])) for r in Ledger.read(run.ledger).records]
    return [(kind.name, step) for kind, step in found if kind not in left_out]


def steps_recorded(run: RunFolder) -> int:
    return max((step for kind, step in records(run) if kind == "STEP"), default=0)


def lines(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [line for line in run.read_metrics() if line["kind"] == kind]


def unfinished(run: RunFolder) -> list[int]:
    """Return the steps of checkpoints that are being written."""
    found = run.checkpoints.glob("*.unfinished")
    return [int(path.stem.removeprefix("step_")) for path in found]


def shards(run: RunFolder, step: int) -> dict[str, object]:
    """Return the digests of a checkpoint's shards, which are checked."""
    folder = run.checkpoint(step)
    check_files(folder)
    return {n: f for n, f in read_files(folder).files.items() if n.endswith(".distcp")}


def expect_equal(run: RunFolder, expected: RunFolder) -> None:
    """Expect the same records, curves and last weights, and nothing that is left over."""
    curve, other = read_curve(run.path), read_curve(expected.path)
    assert curve == other
    assert [r for r in records(run) if r[0] != "CHECKPOINT"] == [
        r for r in records(expected) if r[0] != "CHECKPOINT"
    ]
    last = max(steps_saved(expected.path))
    assert shards(run, last) == shards(expected, last)
    assert unfinished(run) == []


def test_training_goes_on_while_a_checkpoint_is_pending(
    whole: tuple[list[str], RunFolder, Curve], tmp_path: Path
) -> None:
    arguments, expected, _ = whole
    run = RunFolder(tmp_path / "run")
    opened = threading.Event()
    pending: list[int] = []  # steps that began while the first checkpoint was pending
    seen: list[tuple[list[int], int, int]] = []

    def look(step: int) -> None:
        if unfinished(run) and not opened.is_set():
            pending.append(step)
            if len(pending) == 3:
                seen.append((steps_saved(expected.path)[:1], steps_recorded(run), step))
                assert unfinished(run) == seen[0][0]
                assert lines(run, "train")[-1]["step"] == step - 1
                opened.set()

    with before_steps(look), before_shards(lambda: opened.wait(DEADLINE_SECONDS) and None):
        train_here(arguments, run.path)
    ((first,), recorded, step) = seen[0]
    assert recorded == first, "records of later steps wait for the checkpoint's"
    assert step == first + 3
    assert records(run) == records(expected)
    for saved in steps_saved(expected.path):
        assert shards(run, saved) == shards(expected, saved), saved
    expect_equal(run, expected)


def test_an_update_waits_for_the_copy(
    whole: tuple[list[str], RunFolder, Curve], tmp_path: Path
) -> None:
    arguments, expected, _ = whole
    run = RunFolder(tmp_path / "run")
    *_, last = steps_saved(expected.path)
    begun: list[int] = []
    waiting: list[int] = []  # steps whose updates wait
    wait_for_copy = PendingShards.wait_for_copy

    def wait(shards: PendingShards) -> None:
        waiting.append(begun[-1])
        wait_for_copy(shards)

    def be_late() -> None:
        (saved,) = unfinished(run)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while saved < last and (not waiting or waiting[-1] <= saved):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.2)
        assert begun[-1] <= saved + 1, "no step begins before the update is done"

    with (
        replaced(PendingShards, "wait_for_copy", wait),
        before_steps(begun.append),
        before_copies(be_late),
    ):
        train_here(arguments, run.path)
    expect_equal(run, expected)
    for saved in steps_saved(expected.path):
        assert shards(run, saved) == shards(expected, saved), saved
    assert all(line["save_stall_seconds"] > 0.19 for line in lines(run, "checkpoint"))


def test_every_save_has_a_line(whole: tuple[list[str], RunFolder, Curve]) -> None:
    _, run, _ = whole
    saved = lines(run, "checkpoint")
    assert [line["step"] for line in saved] == steps_saved(run.path)
    trained = {line["step"]: line for line in lines(run, "train")}
    for line in saved:
        assert 0.0 < line["save_stall_seconds"] <= line["save_seconds"]
        assert line["tokens"] == trained[line["step"]]["tokens"]
        assert line["phase"] == trained[line["step"]]["phase"]
        files = read_files(run.checkpoint(line["step"])).files
        on_disk = sum(f.num_bytes for name, f in files.items() if name.endswith(".distcp"))
        assert 0.5 * on_disk < line["bytes"] < on_disk, "the tensors, without their headers"


def test_a_run_killed_while_a_checkpoint_is_pending_goes_on(
    whole: tuple[list[str], RunFolder, Curve], tmp_path: Path
) -> None:
    arguments, expected, _ = whole
    run = RunFolder(tmp_path / "run")
    program = [[*arguments, f"--run_dir={run.path}"], run.path]
    deadline = time.monotonic() + DEADLINE_SECONDS
    with started_ranks(train_slowly, program, ranks=1, logs=tmp_path) as (process,):
        pending: list[int] = []
        while not pending or lines(run, "train")[-1]["step"] < pending[0] + 2:
            assert process.is_alive(), (tmp_path / "rank0.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
            if run.newest_checkpoint() is not None:
                pending = unfinished(run)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert steps_recorded(run) == pending[0], "the records of later steps were in memory"
    train_here([*arguments, RESUME], run.path)
    expect_equal(run, expected)
    assert steps_saved(run.path) == steps_saved(expected.path)


def test_a_disk_that_refuses_for_some_steps(
    whole: tuple[list[str], RunFolder, Curve], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments, expected, _ = whole
    run = RunFolder(tmp_path / "run")
    first = steps_saved(expected.path)[0]
    with small_files(range(first, first + 4)):
        train_here(arguments, run.path)
    refused = [m for m in caplog.messages if "was not saved" in m]
    assert refused
    assert all("__0_0.distcp" in message for message in refused)
    assert all("File too large" in message for message in refused)
    assert first not in steps_saved(run.path)
    assert first + 2 <= min(steps_saved(run.path)) <= first + 6, "it was saved a few steps later"
    expect_equal(run, expected)


def test_the_last_save_must_succeed(
    whole: tuple[list[str], RunFolder, Curve], tmp_path: Path
) -> None:
    arguments, expected, curve = whole
    run = RunFolder(tmp_path / "run")
    steps = len(curve.losses)
    program = [[*arguments, f"--run_dir={run.path}"], 0, steps, steps]
    with started_ranks(train_with_small_files, program, ranks=1, logs=tmp_path) as (process,):
        process.join(DEADLINE_SECONDS)
        assert process.exitcode == 1
    said = (tmp_path / "rank0.log").read_text().splitlines()[-1]
    assert re.match(rf"error: .*step_{steps:08d}.*__0_0\.distcp: .* File too large", said)
    assert unfinished(run) == []
    assert steps_saved(run.path) == steps_saved(expected.path)[:-1]
    assert records(run)[-1] == ("STEP", steps), "nothing claims that the run has ended"
    train_here([*arguments, RESUME], run.path)
    expect_equal(run, expected)


def test_one_of_two_ranks_cannot_write(
    whole: tuple[list[str], RunFolder, Curve], tmp_path: Path
) -> None:
    arguments, expected, curve = whole
    run = RunFolder(tmp_path / "run")
    first = steps_saved(expected.path)[0]
    program = [
        [*arguments, *LAYOUTS["tp2"].arguments(), f"--run_dir={run.path}"],
        *(1, first, first + 3),
    ]
    run_ranks(
        train_with_small_files,
        program,
        ranks=2,
        logs=tmp_path,
        deadline_seconds=DEADLINE_SECONDS,
    )
    said = (tmp_path / "rank0.log").read_text()
    assert re.search(r"was not saved: .*__1_0\.distcp.*\. Training goes on", said)
    assert "File too large" in said
    assert first not in steps_saved(run.path)
    assert read_curve(run.path).largest_relative_difference(curve) <= 1e-5
    assert unfinished(run) == []
    for step in steps_saved(run.path):
        assert set(shards(run, step)) == {"__0_0.distcp", "__1_0.distcp"}
    kinds = [kind for kind, _ in records(run)]
    assert kinds.count("STEP") == len(curve.losses)
    assert kinds[-2:] == ["CHECKPOINT", "END"]


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount (unshare -rm)")
def test_a_full_disk(whole: tuple[list[str], RunFolder, Curve], tmp_path: Path) -> None:
    arguments, expected, _ = whole
    disk = tmp_path / "disk"
    disk.mkdir()
    first = steps_saved(expected.path)[0]
    num_bytes = 2**27
    free = {first - 1: 300_000, first + 2: 0, first + 4: num_bytes // 2}
    program = [
        [*arguments, f"--run_dir={disk / 'run'}"],
        *(disk, num_bytes, free, tmp_path / "copy"),
    ]
    run_ranks(
        train_on_small_disk, program, ranks=1, logs=tmp_path, deadline_seconds=DEADLINE_SECONDS
    )
    said = (tmp_path / "rank0.log").read_text()
    assert re.search(
        r"was not saved: .*a checkpoint needs [\d,]+ bytes, but \d+,\d+ are free", said
    )
    run = RunFolder(tmp_path / "copy" / "run")
    assert first not in steps_saved(run.path)
    expect_equal(run, expected)
    assert json.loads(run.metrics_lines()[-1])["kind"] == "checkpoint"


@pytest.mark.skipif(not may_mount_images(), reason="needs root and loop devices")
def test_a_disk_that_becomes_read_only(
    whole: tuple[list[str], RunFolder, Curve], tmp_path: Path
) -> None:
    arguments, expected, curve = whole
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(2**26)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    given = [*arguments, f"--run_dir={disk / 'run'}", RESUME]
    log = tmp_path / "rank0.log"
    for fails in (True, False):
        program = partial(train_on_failing_disk, fails=fails)
        places = [given, image, disk, tmp_path / "copy"]
        with started_ranks(program, places, ranks=1, logs=tmp_path) as (process,):
            process.join(DEADLINE_SECONDS)
            assert process.exitcode == int(fails), log.read_text()
        if fails:
            said = log.read_text()
            assert "run/metrics.jsonl: cannot be written (Read-only file system)" in said
            assert "run/ledger: cannot be written (Read-only file system)" in said
            assert re.search(r"was not saved: .*Read-only file system", said)
            assert said.count(" · loss ") == len(curve.losses), "it trained to its end"
            assert re.match(r"error: .*Read-only file system", said.splitlines()[-1])
            # As a machine does when it starts: 1 says that errors were mended.
            mended = subprocess.run(["e2fsck", "-fy", image], capture_output=True, check=False)
            assert mended.returncode in (0, 1), mended.stdout
    assert "resumed from" in log.read_text()
    expect_equal(RunFolder(tmp_path / "copy" / "run"), expected)
