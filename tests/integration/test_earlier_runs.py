"""Runs that an earlier version left behind: they still verify, and training goes on from them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ettin.checkpoint import read_model
from megatron_ettin.order.ledger import Ledger
from tests.training import train_here

ROOT = Path(__file__).parents[2]
EARLIER = Path(__file__).parent / "earlier_runs"
COLUMNS = ["step", "phase", "g_begin", "g_end", "n_tokens", "order_digest", "token_digest"]
#: Chain heads that the runs printed when they ended.
HEADS = {
    "encoder": "11320cc2eda3ebd8c25552e34c1ed9d2aa24c5bf2faaa4688754b02036e08e94",
    "decoder": "766cccc0b650313c11df256af3784c39a8232c0c78948c649689f678b9c78502",
    "amended": "06e9ce83f43f18ba36d6757c02298e23e0fdba10ca7d25996fd1f5f4d3b25cb5",
}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Copy the runs: a question writes plans and identities beside the corpora."""
    return shutil.copytree(EARLIER, tmp_path / "runs")


def ask(folder: Path, *arguments: str) -> dict[str, Any]:
    """Ask tools/order.py, in the folder that the runs' relative paths start from."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "order.py", *arguments, "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("name", HEADS)
def test_an_earlier_run_verifies(runs: Path, name: str) -> None:
    answer = ask(runs, "verify", "--run", name, "--tokens", "--weights", "--head", HEADS[name])
    assert answer["verdict"] == "PASS"


def test_earlier_twins_saw_the_same(runs: Path) -> None:
    answer = ask(runs, "twins", "--run", "encoder", "--run", "decoder")
    assert answer["verdict"] == "PASS"


def test_an_earlier_checkpoint_says_what_trained_it(runs: Path) -> None:
    for name, objective in (("encoder", "MaskedLM"), ("decoder", "CausalLM")):
        *_, last = sorted((runs / name / "checkpoints").iterdir())
        assert "objective" not in json.loads((last / "model.json").read_text())
        assert str(read_model(last).objective).rpartition(".")[2] == objective


@pytest.mark.slow
def test_training_goes_on_from_an_earlier_checkpoint(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeat the last three steps of the encoder; the record of them is the earlier one."""
    monkeypatch.chdir(runs)
    before = Ledger.read(Path("encoder/ledger")).steps
    shutil.rmtree("encoder/checkpoints/step_00000018")
    arguments = ["--config=run.yaml", "--objective=MaskedLM", "--checkpoint.resume=true"]
    arguments.append('--objective.mask_rate_by_phase={"long": 0.15}')
    train_here([*arguments, "--checkpoint.save_every_tokens=5000"], Path("encoder"))
    after = Ledger.read(Path("encoder/ledger"))
    for column in [*COLUMNS, "mask_digest"]:
        assert np.array_equal(after.steps[column], before[column]), column
    (fork,) = after.forks()
    assert fork.steps == 3
