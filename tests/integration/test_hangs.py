"""A rank that hangs: the stacks of all ranks are written, torchrun restarts, the run goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ettin.evaluation.layouts import read_curve
from megatron_ettin.order.run_folder import RunFolder
from tests.conftest import TinyCorpus
from tests.hanging import STEP
from tests.ranks import run_job

ROOT = Path(__file__).parents[2]
#: Far above a step's time here, and as short as the test may be.
HANG_SECONDS = 6.0
#: Without the second one, ranks that are started again find the old ones' addresses (torch 2.13).
VARIABLES = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def torchrun(how: str, arguments: list[str], log: Path) -> str:
    """Run the hanging program on two ranks to its end; return its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with log.open("w") as file:
        done = subprocess.run(
            [*command, "--max-restarts=1", "tests/hanging.py", how, *arguments],
            cwd=ROOT,
            env={**os.environ, **VARIABLES, "PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, log.read_text()[-4000:]
    return log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sleep", pytest.param("keep the lock", marks=pytest.mark.long)])
def test_a_hang_is_written_down_and_the_run_goes_on(
    how: str, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    phase = {"name": "short", "train_tokens": 16_000, "seq_length": 128, "global_batch_size": 16}
    path = tiny_corpus.write_config(tmp_path / "run.yaml", objective="MaskedLM", phases=[phase])
    config, run = f"--config={path}", RunFolder(tmp_path / "run")
    saves = "--checkpoint.save_every_tokens=4000"
    whole = [config, saves, f"--run_dir={tmp_path / 'whole'}"]
    code, output = run_job(whole, ranks=2, logs=tmp_path, deadline_seconds=200)
    assert code == 0, output
    output = torchrun(
        how,
        [
            *(config, saves, f"--run_dir={run.path}", "--checkpoint.resume=true"),
            f"--trouble.hang_seconds={HANG_SECONDS}",
        ],
        tmp_path / "log",
    )
    texts = {path.name: path.read_text() for path in run.hangs.glob("*.txt")}
    by_rank = {name[-len("0000.txt") :][:4]: text for name, text in texts.items()}
    assert "training/loop.py" in by_rank["0000"], "it waits in a step"
    assert by_rank["0000"].count("(sleeping)") + by_rank["0000"].count("(running)") == 2
    if how == "sleep":
        assert set(by_rank) == {"0000", "0001"}
        assert 'tests/hanging.py", line' in by_rank["0001"]
        assert "in hang" in by_rank["0001"]
    else:
        assert set(by_rank) == {"0000"}
        assert output.count("in hang\n") == 1, "only the log has the stacks of this rank"
    assert output.count("error: no step was finished within") == len(by_rank)
    waited_for = json.loads(next(run.hangs.glob("*rank_0000.collectives.json")).read_text())
    assert waited_for["entries"]
    assert "resumed from" in output
    assert read_curve(run.path) == read_curve(tmp_path / "whole"), "bit for bit"
    assert len(read_curve(run.path).losses) > STEP
