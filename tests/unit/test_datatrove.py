"""Shards made as datatrove's tasks are those of a plain run, also after one of them was killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ettin.data.preprocess import preprocess
from megatron_ettin.data.preprocess_options import PreprocessOptions
from megatron_ettin.data.raw_files import expand_inputs
from megatron_ettin.data.tokenize import load_tokenizer, train_tokenizer, write_tokenizer

pytest.importorskip("datatrove")

from megatron_ettin.data.datatrove_step import PreprocessShards, run_on
from megatron_ettin.data.own_process import run_in_own_process
from tests.unit import dying_shards, slurm_stand_in

pytestmark = [
    pytest.mark.slow,
    # Said by datatrove and Ray of themselves and of what they leave to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROOT = Path(__file__).parents[2]
SHARDS, TASKS = 3, 2
# Either the task's own error, or the list of tasks if datatrove's queue broke first.
KILLED = r"shard \d \(.*jsonl\): killed by SIGKILL|tasks \[.*\] of \d failed; their logs: "
TIMED = (".identity.json", ".inputs.json")
WORDS = ["the", "film", "was", "good", "bad", "long", "short", "plot", "never", "again", "why"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PreprocessOptions:
    """Return the options of a plain run over several files, whose output is there."""
    folder = tmp_path_factory.mktemp("plain")
    random = np.random.default_rng(1)
    inputs = []
    for name in "abc"[:SHARDS]:
        path = folder / f"{name}.jsonl"
        texts = [" ".join(random.choice(WORDS, size=n)) for n in random.integers(0, 60, size=90)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        inputs.append(str(path))
    tokenizer = folder / "tokenizer"
    write_tokenizer(train_tokenizer(iter(WORDS * 50), vocab_size=290), tokenizer)
    options = PreprocessOptions(
        inputs=expand_inputs(inputs),
        output_prefix=folder / "out" / "corpus",
        tokenizer=tokenizer,
        shards=True,
    )
    preprocess(options)
    return options


@pytest.fixture
def options(plain: PreprocessOptions, tmp_path: Path) -> PreprocessOptions:
    return replace(plain, output_prefix=tmp_path / "out" / "corpus")


def made(options: PreprocessOptions) -> dict[str, bytes]:
    """Return the files by name, without those that hold times."""
    folder = options.output_prefix.parent
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(TIMED)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def run(executor: str, options: PreprocessOptions, **settings: Any) -> str | None:
    logs = options.output_prefix.parent.with_name("logs")
    return run_on(executor, options, TASKS, logging_dir=logs, **settings)


def test_copies_are_found_over_all_shards(options: PreprocessOptions, tmp_path: Path) -> None:
    once = replace(options, deduplicate="exact")
    elsewhere = replace(once, output_prefix=tmp_path / "plain" / "corpus")
    assert preprocess(elsewhere).corpora[elsewhere.corpus("text", "document")]["duplicate"] > 0
    run("local", once)
    assert made(once) == made(elsewhere)


def test_the_tool_runs_an_executor(plain: PreprocessOptions, options: PreprocessOptions) -> None:
    command = [
        sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--shards", "--input",
        *(file.path for file in plain.inputs), "--tokenizer", str(plain.tokenizer),
        "--output-prefix", str(options.output_prefix), "--executor", "local", "--tasks", "2",
        "--executor-options", "workers=2",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{options.corpus('text', 'document')}: ")
    shutil.rmtree(options.output_prefix.with_name("corpus.logs"))
    assert made(options) == made(plain)


def test_task_that_was_killed_is_an_error_and_the_next_run_goes_on(
    plain: PreprocessOptions, options: PreprocessOptions
) -> None:
    """A task ends after its last shard is there; Slurm's, Ray's and one below end before it is."""
    with pytest.raises(RuntimeError, match=KILLED):
        run("local", options, shard_work=dying_shards.die_after)
    assert made(options) != made(plain)
    run("local", options, shard_work=dying_shards.die_after)
    assert made(options) == made(plain)


def test_bad_input_is_named(options: PreprocessOptions) -> None:
    with pytest.raises(RuntimeError, match=r"shard 1 .*: error: c.jsonl:17: invalid UTF-8"):
        run("local", options, shard_work=dying_shards.refuse)


def test_local_tasks_make_what_a_plain_run_makes_whatever_marks_are_there(
    plain: PreprocessOptions, options: PreprocessOptions
) -> None:
    run("local", options)
    assert made(options) == made(plain)
    shutil.rmtree(options.output_prefix.parent)
    run("local", options)
    assert made(options) == made(plain)


def test_completed_tasks_are_left_out_on_request(
    plain: PreprocessOptions, options: PreprocessOptions
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        run("local", options, shard_work=dying_shards.die_before, workers=1)
    logs = options.output_prefix.parent.with_name("logs") / "shards" / "completions"
    assert [path.name for path in logs.iterdir()] == ["00000"]
    refusing = dying_shards.refuse  # of shard 1, which is task 1's: reached, as its mark is missing
    with pytest.raises(RuntimeError, match="invalid UTF-8"):
        run("local", options, shard_work=refusing, workers=1, skip_completed=True)
    run("local", options, skip_completed=True)
    assert made(options) == made(plain)


def test_shards_of_a_rank(options: PreprocessOptions) -> None:
    step = PreprocessShards(options)
    assert list(step.run(None, rank=0, world_size=TASKS)) == []
    shards = options.corpus("text", "document").glob("*.idx")
    assert {path.stem for path in shards} == {"00000", "00002"}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the jobs' scripts of a Slurm that runs them at once."""
    jobs = slurm_stand_in.install(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{jobs.parent}:{os.environ['PATH']}")
    return jobs


SLURM: dict[str, Any] = {"time": "1:00:00", "partition": "cpu"}


def test_slurm_jobs_make_what_a_plain_run_makes(
    plain: PreprocessOptions, options: PreprocessOptions, slurm: Path
) -> None:
    last = run("slurm", options, cpus_per_task=2, **SLURM)
    logs = "".join(path.read_text() for path in options.output_prefix.parents[1].rglob("*.out"))
    assert made(options) == made(plain), logs
    script = (slurm / "1").read_text()
    for line in ("--partition=cpu", "--time=1:00:00", "--array=0-1", "--cpus-per-task=2"):
        assert f"#SBATCH {line}\n" in script
    assert "launch_pickled_pipeline" in (slurm / str(last)).read_text()


def test_slurm_finishes_nothing_without_all_shards(
    plain: PreprocessOptions, options: PreprocessOptions, slurm: Path
) -> None:
    last = run("slurm", options, shard_work=dying_shards.die_before, **SLURM)
    assert (slurm / str(last)).read_text().endswith("# never ran\n# failed\n")
    assert not (options.corpus("text", "document") / "dataset.json").exists()
    run("slurm", options, shard_work=dying_shards.die_before, **SLURM)
    assert made(options) == made(plain)


def test_slurm_needs_time_and_partition(
    options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="partition"):
        run("slurm", options, time="1:00:00")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(ValueError, match="from outside of a job"):
        run("slurm", options, **SLURM)


def test_ray_tasks_make_what_a_plain_run_makes(
    plain: PreprocessOptions, options: PreprocessOptions
) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=TASKS, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(RuntimeError, match=r"tasks \[1\] of 2 failed; their logs: "):
            run("ray", options, shard_work=dying_shards.die_before, mem_per_cpu_gb=0.1)
        run("ray", options, shard_work=dying_shards.die_before, mem_per_cpu_gb=0.1)
    finally:
        ray.shutdown()
    assert made(options) == made(plain)


def test_process_ends_with_the_one_that_waits_for_it(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    program = (
        "from pathlib import Path\n"
        "from megatron_ettin.data.own_process import run_in_own_process\n"
        "from tests.unit.dying_shards import sleep\n"
        f"run_in_own_process(sleep, [Path({str(mark)!r})])\n"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as waiting:
        deadline = time.monotonic() + 60
        while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        waiting.kill()
    pid = int(mark.read_text())
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_threads_are_told(tmp_path: Path) -> None:
    run_in_own_process(dying_shards.note_threads, [tmp_path / "threads"], threads=3)
    assert (tmp_path / "threads").read_text() == "3"


def test_tokenizer_of_the_fixture_loads(plain: PreprocessOptions) -> None:
    assert load_tokenizer(plain.tokenizer).ids.vocab_size == 290
