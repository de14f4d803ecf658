"""A run that is asked to stop saves at its next report, ends with code 0, and goes on later."""

import json
import time
from pathlib import Path

import pytest

from megatron_ettin.config import parse_args
from megatron_ettin.order.ledger import Kind, Ledger
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.pretrain import pretrain
from megatron_ettin.training.metrics import Interval
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
def test_a_run_that_is_asked_at_the_end_of_a_phase(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ask in the first step; reports come at the ends of the two phases only."""
    config = tiny_corpus.write_config(
        tmp_path / "run.yaml", objective="MaskedLM", logging={"log_every_steps": 1000}
    )
    run = RunFolder(tmp_path / "run")
    arguments = [f"--config={config}", f"--run_dir={run.path}", RESUME]
    begin_step = Interval.begin_step

    def ask(interval: Interval, *step: object) -> None:
        run.stop.touch()
        begin_step(interval, *step)  # type: ignore[arg-type]

    monkeypatch.setattr(Interval, "begin_step", ask)
    pretrain(parse_args(arguments))
    assert len(steps_saved(run.path)) == 1
    assert last_record(run) is Kind.CHECKPOINT
    pretrain(parse_args(arguments))
    assert len(steps_saved(run.path)) == 2
    assert last_record(run) is Kind.END, "it was asked in the last step, and had nothing to do"
