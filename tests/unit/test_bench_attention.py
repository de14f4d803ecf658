"""The attention's benchmark: documents as rows have them, and a figure for everything it names."""

import json
import sys

import numpy as np
import pytest

from benchmarks.attention_times import documents
from tools import bench_attention


def test_documents_fill_rows_of_whole_segments() -> None:
    found = documents(4096, 1024, 200)
    assert found.dtype == np.int32
    assert len(found) == 4 * (1024 // 16 + 1) + 1
    lengths = np.diff(found)
    assert (lengths >= 0).all()
    assert lengths.sum() == 4096
    assert set(range(0, 4097, 1024)) <= set(found.tolist())  # no document crosses a row
    assert 100 < lengths[lengths > 0].mean() < 300


def test_every_kernel_has_its_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--models", "nano", "--slots", "256", "--seq-length", "128", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_attention.py", *options, "--json"])
    bench_attention.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["slots"], set(report["nano"])) == (256, {"bidirectional", "causal"})
    for kernels in report["nano"].values():
        assert len(kernels) >= 2
        for times in kernels.values():
            assert {"global_ms", "local_ms"} <= set(times)
            assert min(times.values()) > 0.0
