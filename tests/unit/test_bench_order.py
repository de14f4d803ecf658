"""The benchmark of the order runs through and reports every figure; how fast is not asserted."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEYS = {
    "locate_ns",
    "pieces_us",
    "where_us",
    "plan_docs_per_s_core",
    "plan_peak_bytes_per_doc",
    "index_bytes_per_sample",
    "first_batch_s",
    "first_batch_rss_mb",
    "checkpoint_hash_gb_s",
    "cold_read_ratio",
    "loader_tokens_per_s_core",
    "ledger_append_us",
    "verify_400k_s",
    "mcore_build_ns_per_doc",
    "mcore_index_bytes_per_sample",
    "mcore_peak_bytes_per_doc",
}


@pytest.mark.slow
def test_every_figure_is_measured_and_nothing_is_left_behind(tmp_path: Path) -> None:
    options = ["--documents", "3000", "--threads", "2", "--work-dir", str(tmp_path), "--json"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_order.py"), *options],
        capture_output=True,
        check=True,
        text=True,
    )
    *table, last = done.stdout.splitlines()
    measured = json.loads(last)
    assert set(measured) == KEYS
    assert all(math.isfinite(value) and value > 0 for value in measured.values()), measured
    assert any("megatron-core" in line for line in table)
    assert any("2 T tokens" in line and "not measured" in line for line in table)
    assert list(tmp_path.iterdir()) == []
