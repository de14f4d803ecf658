"""Two runs in one run folder: the second is refused at once, and changes nothing there."""

import re
import time
from pathlib import Path

import pytest

from megatron_ettin.config import parse_args
from megatron_ettin.order.ledger import LedgerError, LedgerWriter
from megatron_ettin.order.ledger.lock import refuse_second_run
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.pretrain import pretrain
from tests.conftest import TinyCorpus
from tests.ranks import pretrain_main, run_job, started_ranks
from tests.training import RESUME


def phase(tokens: int) -> dict[str, object]:
    return {"name": "short", "train_tokens": tokens, "seq_length": 128, "global_batch_size": 16}


def files_of(run: RunFolder) -> set[str]:
    """Return the names of all files of a run."""
    return {path.relative_to(run.path).as_posix() for path in run.path.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_run_is_refused_with_the_first_ones_process(
    ranks: int, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    phases = [phase(9 * 10**6)]
    config = tiny_corpus.write_config(tmp_path / "run.yaml", objective="MaskedLM", phases=phases)
    run = RunFolder(tmp_path / "run")
    arguments = [f"--config={config}", f"--run_dir={run.path}", RESUME]
    (tmp_path / "second").mkdir()
    with started_ranks(pretrain_main, [arguments], ranks=1, logs=tmp_path) as (first,):
        deadline = time.monotonic() + 240
        while not run.metrics_lines():
            assert first.is_alive()
            assert time.monotonic() < deadline, "it never reported"
            time.sleep(0.02)
        before = files_of(run)
        logs = tmp_path / "second"
        code, output = run_job(arguments, ranks=ranks, logs=logs, deadline_seconds=200)
        assert code == 1
        expected = (
            rf"error: .*/ledger/lock: process {first.pid} on \S+ is writing this ledger; wait"
        )
        assert len(re.findall(expected, output)) == 1, output
        assert "corpus files, alike on all" not in output, (
            "it is refused before anything else is looked at"
        )
        assert files_of(run) == before
        assert first.is_alive()
        read = len(run.metrics_lines())
        while len(run.metrics_lines()) <= read:
            assert first.is_alive(), "the first run goes on"
            time.sleep(0.02)
    refuse_second_run(run.ledger)  # the lock ended with its owner


def test_a_run_that_has_ended_takes_the_lock_too(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """Somebody extends a run that has ended; somebody else starts it again as it was."""
    phases = [phase(3000)]
    config = tiny_corpus.write_config(tmp_path / "run.yaml", objective="MaskedLM", phases=phases)
    run = RunFolder(tmp_path / "run")
    arguments = [f"--config={config}", f"--run_dir={run.path}", RESUME]
    for _ in range(2):  # the second start finds a run that has ended
        assert pretrain(parse_args(arguments)) == 0
    ledger, metrics = run.read_ledger(), run.metrics.read_bytes()
    with LedgerWriter.open(run.ledger, at=ledger.head), pytest.raises(LedgerError, match="process"):
        pretrain(parse_args(arguments))
    assert run.read_ledger().head == ledger.head
    assert run.metrics.read_bytes() == metrics
    assert pretrain(parse_args(arguments)) == 0


def test_looking_for_another_run_writes_nothing(tmp_path: Path) -> None:
    refuse_second_run(tmp_path / "ledger")
    assert list(tmp_path.iterdir()) == []
    with (
        LedgerWriter.open(tmp_path / "ledger"),
        pytest.raises(LedgerError, match="is writing this ledger"),
    ):
        refuse_second_run(tmp_path / "ledger")
    refuse_second_run(tmp_path / "ledger")
