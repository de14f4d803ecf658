"""The benchmark of passes over a corpus runs through and finds what is there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_pass_is_measured(tmp_path: Path) -> None:
    options = ["--mb", "1", "--passages", "200", "--rounds", "1", "--json"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_scan.py"), *options, "--work-dir", tmp_path],
        capture_output=True,
        check=True,
        text=True,
    )
    times = json.loads(done.stdout.splitlines()[-1])
    assert len(times) == 2 * 6
    assert all(time["gigabytes_per_second"] > 0.0 for time in times)
    of_uint16, of_int32 = (
        [t["found"] for t in times if t["dtype"] == d] for d in ("uint16", "int32")
    )
    assert of_uint16 == of_int32
    read, _, frequent, most_frequent, few, many = of_uint16
    # Two passages of 200 are copies of 60 words, and have 48 sequences each.
    assert (read, most_frequent, few, many) == (0, 500, 48, 96)
    assert 0 < frequent < 500
    assert list(tmp_path.iterdir()) == []
