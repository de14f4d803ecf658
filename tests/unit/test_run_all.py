"""The script that checks and measures on a GPU: its stages, their order and time, its needs.

tests/unit/test_gpu_turns.py runs its processes.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.gpu import run_all
from tests.gpu.run_all import NEEDED, keep_traces, line, missing_imports, prepare
from tests.gpu.stages import (
    CALL_SECONDS,
    ROOT,
    SET_UP_SECONDS,
    SOURCES,
    Stage,
    allowance,
    corpus_commands,
    has_corpus,
    stages,
)

SCRIPT = ROOT / "tests/gpu/run_all.sh"
#: What issue and README promise of the two short calls.
CALLS = {
    1: [
        "environment",
        "micro",
        "attention",
        "kernels",
        "parity",
        "bench-17m",
        "bench-150m",
        "hot-path",
        "graphs",
        "bench-graphs-17m",
        "bench-graphs-150m",
        "profile",
    ],
    2: ["fp8", "graphs-fp8", "bench-1b", "training"],
}


def named(name: str) -> Stage:
    (found,) = [stage for stage in stages() if stage.name == name]
    return found


def option(stage: Stage, name: str) -> str:
    return stage.command[stage.command.index(name) + 1]


@pytest.mark.parametrize(
    ("left", "expected"), [(500.0, 100), (100.0, 100), (70.5, 70), (20.0, 20), (19.9, None)]
)
def test_a_stage_takes_what_is_left_if_that_is_worth_a_start(
    left: float, expected: int | None
) -> None:
    assert allowance(Stage("any", (), 100), left) == expected


def test_stages_are_distinct_and_what_they_name_exists() -> None:
    names = [stage.name for stage in stages()]
    assert len(set(names)) == len(names)
    words = [word for stage in stages() for word in stage.command]
    files = [word for word in words if word.startswith(("tests/", "tools/"))]
    assert [file for file in files if not (ROOT / file).is_file()] == []
    modules = [word for word in words if word.startswith("tests.")]
    assert [m for m in modules if not (ROOT / f"{m.replace('.', '/')}.py").is_file()] == []
    assert "tests/unit/test_attention.py" in words


def test_every_file_of_tests_for_a_gpu_has_a_stage() -> None:
    words = {word for stage in stages() for word in stage.command}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert files <= words


@pytest.mark.parametrize("call", [1, 2])
def test_a_short_call_has_its_stages_in_order_and_fits(
    call: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run_all.py", "--call", str(call), "--dry-run"])
    run_all.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == CALLS[call]
    spent = int(lines[-1].split()[-2])
    assert spent == sum(stage.most_seconds for stage in stages() if stage.call == call)
    assert SET_UP_SECONDS + spent <= CALL_SECONDS[call]


def test_what_is_measured_with_graphs_is_no_capture() -> None:
    graphed = [stage for stage in stages() if "--cuda-graphs" in stage.command]
    assert len(graphed) == 2
    assert all(int(option(stage, "--rounds")) >= 6 for stage in graphed)


def test_1b_fits_a_gpu_and_only_profiles_are_traced() -> None:
    stage = named("bench-1b")
    slots = [int(option(stage, name)) for name in ("--micro-batch-tokens", "--step-tokens")]
    assert slots == [32_768, 2 * 32_768]
    traced = [stage.name for stage in stages() if "--profile" in stage.command]
    assert traced == ["profile", "profile-1b"]


def test_the_environment_is_set_before_anything_is_installed(tmp_path: Path) -> None:
    """`install.sh` would set CUDA_DEVICE_MAX_CONNECTIONS to 1 where it is unset."""
    (tmp_path / "install.sh").write_text(
        'echo "$CUDA_DEVICE_MAX_CONNECTIONS $NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME"\n'
    )
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        ["bash", str(SCRIPT), "--te-bundle", str(tmp_path), "--call", "2", "--dry-run"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    first, *rest = done.stdout.splitlines()
    assert first == "8 lo lo"
    assert [line.split()[0] for line in rest] == CALLS[2]


def test_an_extension_that_is_there_is_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        commands.append(command[1:])

    monkeypatch.setattr(run_all.subprocess, "run", run)
    prepare(None, tmp_path / "log.txt")
    assert commands == []
    monkeypatch.setattr(run_all, "EXTENSION", "megatron_ettin._absent")
    prepare(None, tmp_path / "log.txt")
    assert commands == [["setup.py", "build_ext", "--inplace"]]


def test_wheels_are_what_the_project_needs() -> None:
    lines = (ROOT / "tests/gpu/wheels.txt").read_text().splitlines()
    wheels = [line for line in lines if not line.startswith("#")]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert set(wheels) <= set(constraints)
    pins = dict(wheel.replace("_", "-").split("==") for wheel in wheels)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    requirements = {Requirement(each).name.lower(): Requirement(each).specifier for each in asked}
    for name in ("jsonargparse", "msgspec", "zstandard", "pytest"):
        assert requirements[name].contains(pins[name])
    # What they need in turn: `jsonargparse[signatures]`, and pytest's own.
    assert {"docstring-parser", "typeshed-client", "pluggy", "iniconfig"} <= set(pins)


def test_missing_imports_are_named() -> None:
    assert missing_imports(["json", "no_such_module", "no_such.module"]) == [
        "no_such_module",
        "no_such.module",
    ]
    assert set(missing_imports(NEEDED)) <= {"triton"}, "triton comes with CUDA builds of torch"


def test_corpora_are_made_of_one_text_or_two(tmp_path: Path) -> None:
    for texts in (["a.jsonl"], ["a.jsonl", "b.txt"]):
        made = corpus_commands(texts)
        assert [command[command.index("--input") + 1] for command in made[1:]] == [
            texts[0],
            texts[-1],
        ]
    assert not has_corpus(tmp_path)
    for path in ("tokenizer/tokenizer.json", *(f"tokens/{name}_text_{part}{suffix}"
                 for name in SOURCES for part in ("document", "validation")
                 for suffix in (".bin", ".idx"))):  # fmt: skip
        assert not has_corpus(tmp_path)
        (tmp_path / "quickstart" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "quickstart" / path).touch()
    assert has_corpus(tmp_path)


def test_traces_are_packed(tmp_path: Path) -> None:
    trace = tmp_path / "traces" / "ours" / "profile.json"
    trace.parent.mkdir(parents=True)
    trace.write_text(json.dumps({"traceEvents": []}))
    keep_traces(tmp_path / "traces", tmp_path / "kept")
    keep_traces(tmp_path / "none", tmp_path / "kept")
    (packed,) = (tmp_path / "kept").iterdir()
    assert packed.name == "ours-profile.json.gz"
    assert json.loads(gzip.decompress(packed.read_bytes())) == {"traceEvents": []}
    assert not (tmp_path / "traces").exists()


def test_the_readme_gives_the_calls_that_there_are() -> None:
    text = (ROOT / "tests/gpu/README.md").read_text()
    assert re.findall(r"run_all\.sh .*--out runs/gpu-\d --call (\d)", text) == ["1", "2"]
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\d) \| (\d+) s \|", text, flags=re.MULTILINE)
    wanted = [(s.name, str(s.call), str(s.most_seconds)) for s in stages() if s.call]
    assert rows == wanted
    assert f"{CALL_SECONDS[1]} s" in text
    assert f"{CALL_SECONDS[2]} s" in text


def test_a_skipped_stage_says_why() -> None:
    found = line({"stage": "bench", "skipped_because": "no corpus"})
    assert found.endswith("skipped: no corpus")
