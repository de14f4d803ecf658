"""A rank that hangs: the stacks of all ranks are written, torchrun restarts, the run goes on."""

import json
import time
from pathlib import Path

import pytest

from megatron_ettin.evaluation.layouts import read_curve
from megatron_ettin.order.run_folder import RunFolder
from tests.conftest import TinyCorpus
from tests.hanging import STEP, pretrain_and_hang
from tests.ranks import run_job
from tests.reliability.launches import forked_agent, kill
from tests.training import RESUME

#: Far above a step's time here, and as short as the test may be.
HANG_SECONDS = 6.0
DEADLINE_SECONDS = 300.0
PHASES = [{"name": "short", "train_tokens": 16_000, "seq_length": 128, "global_batch_size": 16}]


@pytest.fixture(scope="module")
def whole(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nothing hangs in, with its configuration."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_corpus.write_config(folder / "run.yaml", objective="MaskedLM", phases=PHASES)
    code, output = run_job(arguments(folder, folder), ranks=2, logs=folder, deadline_seconds=200)
    assert code == 0, output
    return folder


def arguments(config: Path, folder: Path) -> list[str]:
    run_dir = f"--run_dir={folder / 'run'}"
    return [f"--config={config / 'run.yaml'}", run_dir, "--checkpoint.save_every_tokens=4000"]


def run_and_hang(how: str, given: list[str], folder: Path) -> str:
    """Run the hanging program on two ranks under torchrun's agent; return its output."""
    log, deadline = folder / "log", time.monotonic() + DEADLINE_SECONDS
    with forked_agent([how, *given], folder, log, pretrain_and_hang) as launch:
        while (code := launch.exit_code()) is None:
            assert time.monotonic() < deadline, (folder / "log.d/rank0.log").read_text()[-4000:]
            if launch.stopped() and len(launch.ranks()) == 1:
                # The agent has told it to end, and would kill it in half a minute.
                kill(launch.stopped())
            time.sleep(0.1)
    assert code == 0, log.read_text()[-4000:]
    return log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["sleep", "stop", pytest.param("keep the lock", marks=pytest.mark.long)]
)
def test_a_hang_is_written_down_and_the_run_goes_on(how: str, whole: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    given = [*arguments(whole, tmp_path), RESUME, f"--trouble.hang_seconds={HANG_SECONDS}"]
    output = run_and_hang(how, given, tmp_path)
    texts = {path.name: path.read_text() for path in run.hangs.glob("*.txt")}
    by_rank = {name[-len("0000.txt") :][:4]: text for name, text in texts.items()}
    assert "training/loop.py" in by_rank["0000"], "it waits in a step"
    states = [line.split("(")[-1] for line in by_rank["0000"].splitlines()[1:3]]
    if how == "sleep":
        assert set(by_rank) == {"0000", "0001"}
        assert 'tests/hanging.py", line' in by_rank["0001"]
        assert "in hang" in by_rank["0001"]
    else:
        assert set(by_rank) == {"0000"}
        has_stacks = int(how == "keep the lock")  # in the log alone
        assert output.count("in hang\n") == has_stacks
    assert states[0] in ("sleeping)", "running)")
    assert (states[1] == "stopped)") == (how == "stop")
    assert output.count("error: no step was finished within") == 1, "alike on all ranks: said once"
    waited_for = json.loads(next(run.hangs.glob("*rank_0000.collectives.json")).read_text())
    assert waited_for["entries"]
    assert "resumed from" in output
    assert read_curve(run.path) == read_curve(whole / "run"), "bit for bit"
    assert len(read_curve(run.path).losses) > STEP
