"""Rounds of preprocessing: ours and the other ways on the same text, each a process of its own."""

from __future__ import annotations

import filecmp
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.preprocess_contenders import EncodingResult

ROOT = Path(__file__).parents[1]
OURS = "ours"
#: Contenders, and the packages without which they are left out.
CONTENDERS = {
    OURS: "megatron_ettin",
    "gigatoken": "gigatoken",
    "megatron_fast": "gigatoken",
    "megatron": "megatron.core",
    "datatrove": "datatrove",
}
SLOW = ("megatron", "datatrove")
"""Contenders that get a part of the text."""
SAMPLE_SECONDS = 0.05
SUMMARY = re.compile(r": ([\d,]+) documents, ([\d,]+) tokens; .* ([\d,.]+) tokens/s")


class ContenderError(RuntimeError):
    """A contender that failed; the message has what it said."""


@dataclass(frozen=True, kw_only=True)
class BenchText:
    """Files that contenders read."""

    files: tuple[Path, ...]
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class ContenderRun:
    """One run of a contender."""

    contender: str
    num_bytes: int
    encoded: EncodingResult
    process_seconds: float
    """From the start of the process to its end."""
    peak_bytes: int
    """Largest sum of the resident memory of its processes; pages of files that are mapped count."""
    peak_private_bytes: int
    """Largest sum of the resident memory that is not shared with files or other processes."""

    @property
    def mb_s(self) -> float:
        """Raw text a second, without the start of the interpreter and imports."""
        return self.num_bytes / self.encoded.seconds / 1e6

    @property
    def process_mb_s(self) -> float:
        """Raw text a second of the whole process."""
        return self.num_bytes / self.process_seconds / 1e6


@dataclass(frozen=True, kw_only=True)
class BenchSetting:
    """Conditions that are the same for all contenders."""

    whole: BenchText
    part: BenchText
    """Read by slow contenders in place of `whole`."""
    tokenizer: Path
    folder: Path
    """Gets what they write; emptied after each run."""
    processes: int


def available(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the contenders whose package is installed, and those whose package is not."""
    found = [name for name in names if importlib.util.find_spec(CONTENDERS[name])]
    return found, [name for name in names if name not in found]


def run_rounds(setting: BenchSetting, names: Sequence[str], rounds: int) -> Iterator[ContenderRun]:
    """Run each contender once in each round, so that a busy machine slows all of them."""
    for _ in range(rounds):
        for name in names:
            with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=setting.folder) as folder:
                yield run_contender(setting, name, Path(folder) / "corpus")


def run_contender(setting: BenchSetting, name: str, output: Path) -> ContenderRun:
    """Run a contender, measure time and memory; raise ContenderError if it fails."""
    text = setting.part if name in SLOW else setting.whole
    command = command_of(name, text.files, setting, output)
    os.sync()  # or the disk is still busy with what the one before has written
    with tempfile.TemporaryFile("w+") as answer, tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        process = psutil.Popen(
            command, stdout=answer, stderr=errors, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        sampler = MemorySampler(process)
        returncode = process.wait()
        seconds = time.perf_counter() - begin
        sampler.stop()
        for file in (answer, errors):
            file.seek(0)
        said = answer.read()
        if returncode:
            raise ContenderError(f"{name} failed ({returncode}): {errors.read()[-2000:]}")
    return ContenderRun(
        contender=name,
        num_bytes=text.num_bytes,
        encoded=read_summary_line(said) if name == OURS else read_json_line(said),
        process_seconds=seconds,
        peak_bytes=sampler.peak_bytes,
        peak_private_bytes=sampler.peak_private_bytes,
    )


def command_of(name: str, files: Sequence[Path], setting: BenchSetting, output: Path) -> list[str]:
    """Return the command line of a contender."""
    paths = [str(path) for path in files]
    tokenizer = ["--tokenizer", str(setting.tokenizer)]
    if name == OURS:
        tool = str(ROOT / "tools" / "preprocess_data.py")
        prefix = ["--output-prefix", str(output)]
        return [sys.executable, tool, "--input", *paths, *tokenizer, *prefix]
    program = [sys.executable, "-m", "benchmarks.preprocess_contenders", name]
    options = ["--output", str(output), "--processes", str(setting.processes)]
    return [*program, "--files", *paths, *tokenizer, *options]


def read_json_line(said: str) -> EncodingResult:
    """Return the outcome that is the last line of a program's output."""
    return EncodingResult(**json.loads(said.splitlines()[-1]))


def read_summary_line(said: str) -> EncodingResult:
    """Return the outcome that our tool's summary line tells: seconds are tokens by tokens/s."""
    found = SUMMARY.search(said)
    if not found:
        raise ContenderError(f"no summary in the output of tools/preprocess_data.py: {said!r}")
    documents, tokens, speed = (float(each.replace(",", "")) for each in found.groups())
    return EncodingResult(seconds=tokens / speed, documents=int(documents), tokens=int(tokens))


class MemorySampler(threading.Thread):
    """Peaks of the memory of a process and its children, sampled until `stop`."""

    def __init__(self, process: psutil.Process) -> None:
        """Begin to sample."""
        super().__init__(daemon=True)
        self.process, self.stopped = process, threading.Event()
        self.peak_bytes = self.peak_private_bytes = 0
        self.start()

    def run(self) -> None:
        """Sample every SAMPLE_SECONDS."""
        while not self.stopped.wait(SAMPLE_SECONDS):
            infos = []
            try:
                for each in (self.process, *self.process.children(recursive=True)):
                    infos.append(each.memory_info())
            except psutil.NoSuchProcess:
                pass  # one has ended meanwhile: this sample counts for less
            rss = sum(info.rss for info in infos)
            self.peak_bytes = max(self.peak_bytes, rss)
            private = rss - sum(info.shared for info in infos)
            self.peak_private_bytes = max(self.peak_private_bytes, private)

    def stop(self) -> None:
        """End sampling."""
        self.stopped.set()
        self.join()


def cut(text: BenchText, num_bytes: int, folder: Path) -> BenchText:
    """Return whole lines from the beginning of each file, about `num_bytes` in all.

    Text that is no longer than that is returned as it is.
    """
    if text.num_bytes <= num_bytes:
        return text
    folder.mkdir()
    files = []
    for path in text.files:
        share = path.stat().st_size * num_bytes // text.num_bytes
        with path.open("rb") as whole, (folder / path.name).open("wb") as part:
            part.write(whole.read(share) + whole.readline())
        files.append(folder / path.name)
    return BenchText(files=tuple(files), num_bytes=sum(path.stat().st_size for path in files))


def check_bytes(setting: BenchSetting, names: Sequence[str]) -> dict[str, bool]:
    """Compare our .bin and .idx byte for byte with files that megatron-core's builder wrote.

    `same_as_mcore` is of the same ids, which its own reader read from our files; `same_as_fast`
    is of ids from gigatoken, if that is among the names.
    """
    found = {}
    with tempfile.TemporaryDirectory(prefix="check.", dir=setting.folder) as folder:
        ours, other = Path(folder) / "ours", Path(folder) / "other"
        run_contender(setting, OURS, ours)
        corpus = Path(f"{ours}_text_document")
        command = command_of("rebuild", [Path(f"{corpus}.idx")], setting, other)
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        found["same_as_mcore"] = same_corpus(corpus, other)
        if "megatron_fast" in names:
            run_contender(setting, "megatron_fast", other)
            found["same_as_fast"] = same_corpus(corpus, other)
    return found


def same_corpus(one: Path, other: Path) -> bool:
    """Tell whether two corpora have the same bytes."""
    return all(
        filecmp.cmp(f"{one}.{suffix}", f"{other}.{suffix}", shallow=False)
        for suffix in ("bin", "idx")
    )


def train_tokenizer(files: Sequence[Path], folder: Path, vocab_size: int = 8192) -> None:
    """Train the quickstart's kind of tokenizer on these files; raise ContenderError if it fails."""
    tool = str(ROOT / "tools" / "train_tokenizer.py")
    options = ["--vocab-size", str(vocab_size), "--output", str(folder)]
    command = [sys.executable, tool, "--input", *map(str, files), *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ContenderError(f"the tokenizer was not trained: {done.stderr[-2000:]}")
