"""The benchmark of attestations runs through and reports each figure."""

import json
import sys
from pathlib import Path

import pytest

from tools import bench_attest


def test_every_figure_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.attestation.ANCHORED", 20)
    options = ["--steps", "1000", "--work-dir", str(tmp_path), "--json"]
    monkeypatch.setattr(sys, "argv", ["bench_attest.py", *options])
    bench_attest.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ledger_megabytes"] > 1000 * 128 / 1e6
    for command in ("attest", "verify_attestation", "verify_anchor"):
        for figure in ("wall_seconds", "cpu_seconds", "megabytes"):
            assert found[f"{command}_{figure}"] > 0.0
    assert list(tmp_path.iterdir()) == []
