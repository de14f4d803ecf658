"""The script that checks and measures on a GPU: what it runs, for how long, and what it keeps."""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from pathlib import Path

import pytest

from tests.gpu.run_all import (
    NEEDED,
    OUT_OF_TIME,
    ROOT,
    SOURCES,
    Stage,
    allowance,
    corpus_stages,
    has_corpus,
    keep_traces,
    line,
    missing_imports,
    printed,
    reported,
    run,
    run_stage,
    stages,
)

REPORT = """<?xml version="1.0"?><testsuites><testsuite name="pytest" tests="4">
<testcase classname="a" name="test_x[nano]" time="0.1"><properties>
<property name="logits" value="1.0e-02"/></properties></testcase>
<testcase classname="a" name="test_y"><failure message="assert 2 &lt; 1">...</failure></testcase>
<testcase classname="a" name="test_z"><error message="fixture">...</error></testcase>
<testcase classname="a" name="test_w"><skipped message="gpu"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("left", "expected"), [(500.0, 100), (100.0, 100), (70.5, 70), (20.0, 20), (19.9, None)]
)
def test_a_stage_takes_what_is_left_if_that_is_worth_a_start(
    left: float, expected: int | None
) -> None:
    assert allowance(Stage("any", (), 100), left) == expected


def test_stages_are_distinct_and_what_they_name_exists() -> None:
    named = [stage.name for stage in stages()]
    assert len(set(named)) == len(named)
    words = [word for stage in stages() for word in stage.command]
    assert [w for w in words if w.startswith("tests/") and not (ROOT / w).is_file()] == []
    assert "tests/unit/test_attention.py" in words


def test_every_file_of_tests_for_a_gpu_has_a_stage() -> None:
    words = {word for stage in stages() for word in stage.command}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert files <= words


def test_the_first_checks_fit_in_four_minutes() -> None:
    most = {stage.name: stage.most_seconds for stage in stages()}
    assert most["environment"] + most["kernels"] + most["model-small"] <= 240


def test_a_report_is_read() -> None:
    assert reported(REPORT) == {
        "passed": 1,
        "failed": ["test_y", "test_z"],
        "skipped": 1,
        "measured": {"test_x[nano]": {"logits": "1.0e-02"}},
    }


def test_the_last_line_is_read_if_it_is_an_object() -> None:
    assert printed('a table\n{"a": 1}\n') == {"a": 1}
    assert printed("a table\n") is None
    assert printed("12") is None
    assert printed("") is None


def test_a_stage_leaves_its_record_and_its_log(tmp_path: Path) -> None:
    code = "print('a table'); print('{\"speed\": 3}'); raise SystemExit(4)"
    record = run_stage(Stage("name", ("-c", code), 30), 30, tmp_path)
    assert (record["exit_code"], record["measured"]) == (4, {"speed": 3})
    assert "===== name: exit code 4" in (tmp_path / "log.txt").read_text()
    assert "FAILED (4)" in line(record)


def test_a_stage_of_tests_leaves_its_counts(tmp_path: Path) -> None:
    test = tmp_path / "test_two.py"
    test.write_text("def test_a(): pass\ndef test_b(record_property):\n    assert 1 > 2\n")
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path))
    record = run_stage(Stage("two", (*options, str(test)), 60), 60, tmp_path)
    assert record["exit_code"] == 1
    assert (record["measured"]["passed"], record["measured"]["failed"]) == (1, ["test_b"])
    assert "1 passed, 1 failed, 0 skipped" in line(record)


def test_what_takes_too_long_is_killed_with_what_it_started(tmp_path: Path) -> None:
    child = tmp_path / "pid"
    code = (
        "import subprocess, sys, time, pathlib\n"
        "process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(process.pid))\n"
        "print('begun', flush=True)\n"
        "time.sleep(60)\n"
    )
    begin = time.monotonic()
    found, output = run([sys.executable, "-c", code], 3)
    assert time.monotonic() - begin < 20
    assert found == OUT_OF_TIME
    assert output.startswith("begun\n")
    deadline = time.monotonic() + 10
    while is_running(int(child.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_tests_that_take_too_long_leave_a_report(tmp_path: Path) -> None:
    test = tmp_path / "test_slow.py"
    test.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path))
    record = run_stage(Stage("slow", (*options, str(test)), 6), 6, tmp_path)
    assert record["exit_code"] == OUT_OF_TIME
    assert record["measured"]["passed"] >= 1
    assert "OUT OF TIME; " in line(record)


def is_running(pid: int) -> bool:
    """Tell whether a process is there and no mere entry that nobody has asked for."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_traces_are_packed(tmp_path: Path) -> None:
    trace = tmp_path / "traces" / "ours" / "profile.json"
    trace.parent.mkdir(parents=True)
    trace.write_text(json.dumps({"traceEvents": []}))
    keep_traces(tmp_path / "traces", tmp_path / "kept")
    keep_traces(tmp_path / "none", tmp_path / "kept")
    (packed,) = (tmp_path / "kept").iterdir()
    assert packed.name == "ours-profile.json.gz"
    assert json.loads(gzip.decompress(packed.read_bytes())) == {"traceEvents": []}


def test_missing_imports_are_named() -> None:
    assert missing_imports(["json", "no_such_module", "no_such.module"]) == [
        "no_such_module",
        "no_such.module",
    ]
    assert set(missing_imports(NEEDED)) <= {"triton"}, "triton comes with CUDA builds of torch"


def test_corpora_are_made_of_one_text_or_two(tmp_path: Path) -> None:
    for texts in (["a.jsonl"], ["a.jsonl", "b.txt"]):
        made = corpus_stages(texts)
        inputs = [stage.command[stage.command.index("--input") + 1] for stage in made[1:]]
        assert inputs == [texts[0], texts[-1]]
    assert not has_corpus(tmp_path)
    for path in ("tokenizer/tokenizer.json", *(f"tokens/{name}_text_{part}{suffix}"
                 for name in SOURCES for part in ("document", "validation")
                 for suffix in (".bin", ".idx"))):  # fmt: skip
        assert not has_corpus(tmp_path)
        (tmp_path / "quickstart" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "quickstart" / path).touch()
    assert has_corpus(tmp_path)


def test_a_skipped_stage_says_why() -> None:
    assert line({"name": "bench", "skipped": "no corpus"}).endswith("skipped: no corpus")
