"""The optimizers in every layout, step by step, against whole tensors in one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.optimizer_program import CASES, RESUMED

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_fifty_steps_equal_the_reference_in_every_layout(tmp_path: Path) -> None:
    """One start of four ranks for all cases: their imports take longer than their work."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "4", "-m", "tests.integration.optimizer_program"),
            str(tmp_path),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("rank ") == 4 * len(CASES + RESUMED)
