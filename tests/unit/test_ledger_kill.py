"""kill -9 at random moments of a run: the ledger is never behind a published checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_sigkill_loses_nothing_that_a_checkpoint_refers_to(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.ledger_kills", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    met = json.loads(done.stdout)
    assert met["kills"] >= 100
    assert met["torn"] > 0, "every kill came between two writes: the test shows nothing"
    assert met["forks"] >= 20, "few kills came after steps that no checkpoint holds"
    assert met["interrupted"] > 0, "no kill came while records were moved to a fork"
