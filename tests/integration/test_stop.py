"""A run that is asked to stop, by a file or a signal, saves after its step, and goes on later."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ettin.config import parse_args
from megatron_ettin.order.ledger import Kind, Ledger
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.pretrain import pretrain
from megatron_ettin.training.interval import Interval
from megatron_ettin.training.signals import REQUEUE_CODE, SAME_REQUEST_SECONDS
from tests.conftest import TinyCorpus
from tests.ranks import pretrain_main, started_ranks
from tests.training import RESUME, steps_saved, train_here


def last_record(run: RunFolder) -> Kind:
    return Kind(int(Ledger.read(run.ledger).records["kind"][-1]))


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_saves_ends_and_goes_on(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    config = tiny_corpus.write_config(tmp_path / "run.yaml", objective="MaskedLM")
    expected = train_here([f"--config={config}"], tmp_path / "whole")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.stop.touch()  # of an earlier session: it does not count
    deadline = time.monotonic() + 240
    arguments = [f"--config={config}", f"--run_dir={run.path}"]
    with started_ranks(pretrain_main, [arguments], ranks=2, logs=tmp_path) as processes:
        while len(run.metrics_lines()) < 3:
            assert all(process.is_alive() for process in processes), "it ended too early"
            assert time.monotonic() < deadline, "it never got to its third step"
            time.sleep(0.02)
        run.stop.touch()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
    step = max(steps_saved(run.path))
    assert 3 <= step < len(expected.losses)
    assert f"saved and ended at step {step}" in (tmp_path / "rank0.log").read_text()
    assert json.loads(run.metrics_lines()[-1])["step"] == step
    assert last_record(run) is Kind.CHECKPOINT
    curve = train_here([f"--config={config}", RESUME], run.path)
    assert curve.largest_relative_difference(expected) <= 1e-5
    assert curve.token_digest == expected.token_digest
    assert not run.stop.exists()


@pytest.mark.slow
def test_a_run_that_is_asked_in_its_last_step_ends_as_always(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ask in every step: after the first there is a checkpoint and no report is due."""
    phase = {"name": "short", "train_tokens": 3000, "seq_length": 128, "global_batch_size": 16}
    config = tiny_corpus.write_config(
        tmp_path / "run.yaml",
        objective="MaskedLM",
        phases=[phase],
        logging={"log_every_steps": 1000},
    )
    run = RunFolder(tmp_path / "run")
    arguments = [f"--config={config}", f"--run_dir={run.path}", RESUME]
    begin_step = Interval.begin_step

    def ask(interval: Interval, *step: object) -> None:
        run.stop.touch()
        begin_step(interval, *step)  # type: ignore[arg-type]

    monkeypatch.setattr(Interval, "begin_step", ask)
    assert pretrain(parse_args(arguments)) == 0
    assert steps_saved(run.path) == [1]
    assert last_record(run) is Kind.CHECKPOINT
    assert pretrain(parse_args(arguments)) == 0
    assert steps_saved(run.path) == [1, 2]
    assert last_record(run) is Kind.END, "it was asked in the last step, and had nothing to do"


def wait_for_lines(run: RunFolder, count: int, is_alive: Callable[[], bool]) -> None:
    """Wait until the run has reported `count` times."""
    deadline = time.monotonic() + 240
    while len(run.metrics_lines()) < count:
        assert is_alive(), "it ended too early"
        assert time.monotonic() < deadline, f"it never reported {count} times"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def long_config(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run that no test waits for."""
    path = tmp_path_factory.mktemp("long") / "run.yaml"
    phase = {"name": "short", "train_tokens": 9 * 10**6, "seq_length": 128, "global_batch_size": 16}
    return tiny_corpus.write_config(path, objective="MaskedLM", phases=[phase])


@pytest.mark.slow
def test_sigterm_to_one_rank_saves_and_ends_all(long_config: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    arguments = [f"--config={long_config}", f"--run_dir={run.path}"]
    with started_ranks(pretrain_main, [arguments], ranks=2, logs=tmp_path) as ranks:
        wait_for_lines(run, 3, lambda: all(rank.is_alive() for rank in ranks))
        asked = len(run.metrics_lines())
        began = time.monotonic()
        os.kill(ranks[1].pid or 0, signal.SIGTERM)
        for rank in ranks:
            rank.join(60)
        waited = time.monotonic() - began + 0.05  # rounded to tenths
        assert [rank.exitcode for rank in ranks] == [143, 143]
    (step,) = steps_saved(run.path)
    assert asked <= step <= asked + 20, "it saves after the step, whatever is due"
    said = re.search(
        rf"saved and ended at step {step}: SIGTERM, ([0-9.]+) s ago",
        (tmp_path / "rank0.log").read_text(),
    )
    assert said is not None
    assert float(said[1]) <= waited, "it counts from the signal, which came after `waited` began"
    assert last_record(run) is Kind.CHECKPOINT


@pytest.mark.slow
def test_sigusr1_without_torchrun_asks_to_be_queued_again(
    long_config: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    command = [sys.executable, "-m", "megatron_ettin.pretrain"]
    process = subprocess.Popen([*command, f"--config={long_config}", f"--run_dir={run.path}"])
    try:
        wait_for_lines(run, 2, lambda: process.poll() is None)
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGUSR1)  # by torchrun, and by the scheduler too
        assert process.wait(60) == REQUEUE_CODE
    finally:
        process.kill()
        process.wait()
    assert len(steps_saved(run.path)) == 1


@pytest.mark.slow
def test_a_second_signal_ends_a_rank_that_waits_for_another(
    long_config: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    arguments = [f"--config={long_config}", f"--run_dir={run.path}"]
    with started_ranks(pretrain_main, [arguments], ranks=2, logs=tmp_path) as ranks:
        wait_for_lines(run, 1, lambda: all(rank.is_alive() for rank in ranks))
        stopped, waits = (rank.pid or 0 for rank in ranks)
        os.kill(stopped, signal.SIGSTOP)
        os.kill(waits, signal.SIGTERM)
        time.sleep(SAME_REQUEST_SECONDS + 0.5)
        assert ranks[1].is_alive()
        os.kill(waits, signal.SIGTERM)
        ranks[1].join(10)
        assert ranks[1].exitcode == 143
    assert "SIGTERM, again: ended without saving" in (tmp_path / "rank1.log").read_text()
    assert not run.checkpoints.exists()
