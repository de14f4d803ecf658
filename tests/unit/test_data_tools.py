"""The tools of the data path as commands: what they print, and what an error or a kill leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_ettin.data.preprocess import preprocess
from megatron_ettin.data.preprocess_options import PreprocessOptions
from megatron_ettin.data.raw_files import expand_inputs
from megatron_ettin.data.tokenize import train_tokenizer, write_tokenizer
from megatron_ettin.indexed import IndexedReader

pytestmark = pytest.mark.slow  # each test starts processes

ROOT = Path(__file__).parents[2]
# A tool finds the package in a checkout that is not installed, too.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
TEXTS = [f"The film number {number} was {'good' if number % 3 else 'bad'}." for number in range(99)]


def write_jsonl(path: Path, texts: list[str], times: int = 1) -> Path:
    lines = [json.dumps({"text": text, "title": text[4:18]}) + "\n" for text in texts]
    path.write_text("".join(lines) * times, encoding="utf-8")
    return path


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.glob("**/*") if path.is_file()]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer(TEXTS, 290), folder)
    return folder


def command(tool: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(tool, *arguments),
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        timeout=60,
    )


def test_tools_make_a_tokenizer_and_a_corpus(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "", "", ""])
    folder, prefix = tmp_path / "tokenizer", tmp_path / "corpus"
    trained = run("train_tokenizer.py", "--input", data, "--vocab-size", 290, "--output", folder)
    assert (trained.returncode, trained.stderr) == (0, "")
    assert trained.stdout == f"{folder}: byte-level BPE, 290 tokens\n"
    options = ("--input", tmp_path / "*.jsonl", "--tokenizer", folder, "--output-prefix", prefix)
    split = ("--json-keys", "text", "title", "--validation-share", "0.2")
    made = run("preprocess_data.py", *options, *split)
    assert (made.returncode, made.stderr) == (0, "")
    why, *lines = made.stdout.splitlines()
    assert why.startswith("tokenising with gigatoken: same ids as tokenizers for ")
    for line, key in zip(lines, ("text", "title"), strict=True):
        prefixes = [f"{prefix}_{key}_{part}" for part in ("document", "validation")]
        counts = [len(IndexedReader(name)) for name in prefixes]
        assert sum(counts) == len(TEXTS)
        pattern = (
            rf"{prefix}_{key}_document: {counts[0]} documents, [\d,]+ tokens; validation"
            rf" {counts[1]} documents, [\d,]+ tokens; dropped: 3 empty;"
            r" [\d.,]+ s, [\d.,]+ MB/s, [\d,]+ tokens/s"
        )
        assert re.fullmatch(pattern, line)
    again = run("preprocess_data.py", *options, *split)
    assert [line.endswith("; up to date") for line in again.stdout.splitlines()] == [True, True]


BAD_INPUTS = {
    "missing": (None, "error: no such file: {path}\n"),
    "json": (b'{"text": "a"}\n{"text"}\n', "error: {path}:2: invalid JSON at column 8: "),
    "utf-8": (b'{"text": "\xc3("}\n', "error: {path}:1: invalid UTF-8 at byte 11 of the line"),
    "field": (b'{"body": "a"}\n', 'error: {path}:1: no field "text"; there are "body". Name '),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_tools_end_with_one_clear_line(name: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    content, expected = BAD_INPUTS[name]
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    ended = [
        run("preprocess_data.py", "--input", path, "--tokenizer", tokenizer_folder,
            "--output-prefix", tmp_path / "out" / "x"),
        run("train_tokenizer.py", "--input", path, "--output", tmp_path / "out" / "tokenizer"),
    ]  # fmt: skip
    for process in ended:
        assert process.returncode == 1
        assert process.stderr.startswith(expected.format(path=path))
        assert process.stderr.count("\n") == 1
    assert files_in(tmp_path / "out") == []


@pytest.fixture
def long_run(tmp_path: Path, tokenizer_folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a run of two workers that takes a while; wait until it has written something."""
    for name in "ab":
        # More than half of MIN_BYTES_PER_WORKER.
        write_jsonl(tmp_path / f"{name}.jsonl", [" ".join(TEXTS * 30)], times=400)
    process = subprocess.Popen(
        command("preprocess_data.py", "--input", tmp_path / "*.jsonl", "--shards",
                "--tokenizer", tokenizer_folder, "--output-prefix", tmp_path / "out" / "x",
                "--workers", "2", "--library", "tokenizers"),
        stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    begin = time.monotonic()
    try:
        while not any(path.stat().st_size for path in (tmp_path / "out").glob("*/*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() - begin < 180
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    return workers


def test_a_killed_run_leaves_no_corpus_and_no_process(
    long_run: subprocess.Popen[str], tmp_path: Path, tokenizer_folder: Path
) -> None:
    workers = workers_of(long_run)
    long_run.send_signal(signal.SIGKILL)
    assert long_run.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:  # they hold the pipe that the fixture reads to its end
        worker.kill()
    assert alive == []
    left = {path.suffix for path in (tmp_path / "out").glob("*/*")}
    assert left == {".tmp"}
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", TEXTS)
    again = PreprocessOptions(
        inputs=expand_inputs([str(tmp_path / "*.jsonl")]),
        output_prefix=tmp_path / "out" / "x",
        tokenizer=tokenizer_folder,
        shards=True,
    )
    preprocess(again)
    assert len(IndexedReader(f"{again.corpus('text', 'document')}/00001")) == len(TEXTS)
    assert not list((tmp_path / "out").glob("**/*.tmp"))


def test_a_dead_worker_ends_the_run(long_run: subprocess.Popen[str], tmp_path: Path) -> None:
    workers_of(long_run)[0].kill()
    _, errors = long_run.communicate(timeout=60)
    assert long_run.returncode == 1
    assert errors.startswith("error: a tokenising process died")
    assert {path.suffix for path in files_in(tmp_path / "out")} <= {".tmp"}
