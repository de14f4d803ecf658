"""The benchmark of checkpoints runs through, reports each figure, and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_figure_is_measured(tmp_path: Path) -> None:
    options = ["--models", "nano", "--rounds", "1", "--work-dir", str(tmp_path), "--json"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_checkpoint.py"), *options],
        capture_output=True,
        check=True,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])["nano"]
    parameters = 2.1e6
    assert found["gigabytes"] > 12 * parameters / 1e9, "weights and two moments in fp32"
    assert min(found.values()) > 0.0
    assert list(tmp_path.iterdir()) == []
