"""Processes that take turns on a GPU: figures are on disk at once, one that fails is replaced.

The stages here need no GPU.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import turns
from tests.gpu.run_all import line, run_stages
from tests.gpu.stages import Stage
from tests.gpu.turns import NO_TIME, OUT_OF_TIME, Turns

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


@pytest.fixture(autouse=True)
def nothing_imported_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "IMPORTED_FIRST", {"tests": (), "benchmarks": ()})


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Turns]:
    started = Turns(["tests", "benchmarks"], tmp_path)
    yield started
    started.end()


def program(folder: Path, name: str, code: str) -> Stage:
    """Return a stage of a program with this code."""
    (folder / f"{name}.py").write_text(code)
    return Stage(name, (str(folder / f"{name}.py"), "an-argument"), 8 if name == "slow" else 60)


def run(turns_of: Turns, stage: Stage) -> dict[str, Any]:
    """Run a stage with plenty of time in all."""
    return turns_of.run(stage, stage.command, time.monotonic() + 300)


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_figures_are_on_disk_before_a_stage_ends(both: Turns, tmp_path: Path) -> None:
    child = tmp_path / "pid"
    slow = program(
        tmp_path,
        "slow",
        "import json, pathlib, subprocess, sys, time\n"
        "print('a table')\n"
        "print(json.dumps({'speed': 3}), flush=True)\n"
        "process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(process.pid))\n"
        "time.sleep(60)\n",
    )
    assert run(both, slow)["exit_code"] == OUT_OF_TIME
    assert results(tmp_path) == [{"stage": "slow", "speed": 3}]
    assert "===== slow\na table" in (tmp_path / "log.txt").read_text()
    deadline = time.monotonic() + 10
    while is_running(int(child.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # A new process takes the next stage.
    quick = program(tmp_path, "quick", "import sys; print(sys.argv[1:])")
    assert run(both, quick)["exit_code"] == 0
    assert "===== quick\n['an-argument']" in (tmp_path / "log.txt").read_text()


def test_stages_share_a_process_until_one_fails(both: Turns, tmp_path: Path) -> None:
    pid = "import os, json\nprint(json.dumps({'pid': os.getpid()}))\n"
    codes = []
    for name, end in (
        ("a", ""),
        ("b", "raise SystemExit(4)"),
        ("c", "1 / 0"),
        ("d", "raise SystemExit('error: no')"),
        ("e", "os._exit(7)"),
        ("f", "raise SystemExit(0)"),
    ):
        stage = program(tmp_path, name, pid + end)
        codes.append(run(both, stage)["exit_code"])
    assert codes == [0, 4, 1, 1, 7, 0]
    pids = [each["pid"] for each in results(tmp_path)]
    assert pids[0] == pids[1]
    assert len(set(pids)) == 5
    log = (tmp_path / "log.txt").read_text()
    assert "ZeroDivisionError" in log
    assert "error: no" in log


def test_each_outcome_of_a_test_is_recorded(both: Turns, tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n"
        "def test_a(record_property): record_property('distance', '1.0e-02')\n"
        "def test_b(): assert 1 > 2\n"
        "@pytest.mark.skip\n"
        "def test_c(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_d(broken): pass\n"
    )
    stage = Stage("some", (*PYTEST, "--rootdir", str(tmp_path), str(file)), 60)
    found = run(both, stage)
    assert found["exit_code"] == 1
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    outcomes = {each["test"][-6:]: each for each in results(tmp_path)}
    assert {name: each["outcome"] for name, each in outcomes.items()} == {
        "test_a": "passed",
        "test_b": "failed",
        "test_c": "skipped",
        "test_d": "failed",
    }
    assert outcomes["test_a"]["distance"] == "1.0e-02"
    text = line({"stage": "some", **found})
    assert "FAILED (1); 1 passed, 2 failed, 1 skipped" in text


def test_stages_that_do_not_fit_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    class Instant:
        def __init__(self, *_: object) -> None:
            """Start nothing."""

        def wait(self, seconds: float) -> int:
            return 0

        def run(self, name: str, *_: object) -> dict[str, Any]:
            ran.append(name)
            return {"exit_code": 0}

        def end(self) -> None:
            """Have nothing to end."""

    monkeypatch.setattr(turns, "Process", Instant)
    chosen = [Stage("short", ("a",), 5), Stage("long", ("a",), 60), Stage("last", ("a",), 4)]
    records = run_stages(chosen, tmp_path, time.monotonic() + 10)
    assert ran == ["short", "last"]
    assert records == results(tmp_path)
    assert records[1] == {"stage": "long", "skipped_because": NO_TIME}
    assert capsys.readouterr().out == (tmp_path / "summary.txt").read_text()


def is_running(pid: int) -> bool:
    """Tell whether a process is there and no mere entry that nobody has asked for."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
