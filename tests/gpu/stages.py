"""Stages of the checks on a GPU: what each runs, and the time it may take.

Stages of call 1 and of call 2 fit into one short loan of a GPU each, the most telling first; the
others need more time. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]
TOKENIZER, TOKENS = Path("quickstart/tokenizer"), Path("quickstart/tokens")
#: The sources of examples/data/quickstart.yaml.
SOURCES = ("reviews", "wikipedia")
#: Seconds that a call takes in all, and those of them before its first stage: unpacking,
#: installing, starting processes.
CALL_SECONDS = {1: 480, 2: 200}
SET_UP_SECONDS = 25
ALL_SIZES = ("17m", "32m", "68m", "150m", "400m", "1b")
LARGE = "32m or 68m or 150m or 400m or 1b"
#: Word of a command for which the folder of traces is put in.
TRACES = "TRACES"


@dataclass(frozen=True)
class Stage:
    """A command, and the time it may take."""

    name: str
    command: tuple[str, ...]
    """Arguments of Python."""
    most_seconds: int
    call: Literal[1, 2] | None = None
    """The short call that it is part of."""
    needs_corpus: bool = False

    @property
    def process(self) -> Literal["tests", "benchmarks"]:
        """Return which of the two processes runs it."""
        return "tests" if self.command[:2] == ("-m", "pytest") else "benchmarks"

    @property
    def least_seconds(self) -> int:
        """Return the time that must be left for a start."""
        return min(self.most_seconds, 20)


def checks(name: str, *arguments: str, most: int, call: Literal[1, 2] | None = None) -> Stage:
    """Return a stage of tests; a warning of another version of a package is no failure."""
    options = ("-m", "pytest", "-v", "-W", "default", "-p", "no:cacheprovider")
    return Stage(name, (*options, *arguments), most, call)


def bench(name: str, *arguments: str, most: int, call: Literal[1, 2] | None = None) -> Stage:
    """Return a stage of tools/bench_train.py; of encoders in bf16, ours alone, if not told more."""
    command = ("tools/bench_train.py", "--device", "cuda", "--json", "--objectives", "mlm")
    return Stage(name, (*command, *arguments), most, call, needs_corpus=True)


def compare(name: str, model: str, *settings: str, most: int) -> Stage:
    """Return a stage that trains one run under several settings of the hardware section."""
    command = ("-m", "tests.gpu.compare_settings", model, *settings)
    return Stage(name, command, most, needs_corpus=True)


def stages() -> list[Stage]:
    """Return all of them, in the order in which they run."""
    return [*_first_call(), *_second_call(), *_the_rest()]


def _first_call() -> list[Stage]:
    kernels = sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests/unit").glob("test_*.py")
        if "pytest.mark.gpu" in path.read_text()
    )
    alone = ("--no-peers", "--rounds")
    graphs = ("--cuda-graphs", *alone, "6")
    return [
        Stage("environment", ("-m", "tests.gpu.environment"), 30, 1),
        Stage("micro", ("tools/bench_kernels.py", "--json"), 35, 1),
        Stage("attention", ("tools/bench_attention.py", "--json"), 30, 1),
        checks("kernels", "-m", "gpu", *kernels, most=45, call=1),
        checks("parity", "tests/gpu/test_model.py", "-k", f"not ({LARGE})", most=75, call=1),
        bench("bench-17m", "--models", "17m", *alone, "5", most=25, call=1),
        bench("bench-150m", "--models", "150m", *alone, "5", most=35, call=1),
        checks("hot-path", "tests/gpu/test_hot_path.py", most=20, call=1),
        checks("graphs", "tests/gpu/test_graphs.py", "-k", "bit and MaskedLM", most=60, call=1),
        bench("bench-graphs-17m", "--models", "17m", *graphs, most=30, call=1),
        bench("bench-graphs-150m", "--models", "150m", *graphs, most=40, call=1),
        bench("profile", "--models", "17m", *alone, "1", "--profile", TRACES, most=25, call=1),
    ]


def _second_call() -> list[Stage]:
    # A step of two micro-batches: 1B needs 134 of 140 GiB at 65,536 slots, and half of it here.
    slots = ("--micro-batch-tokens", "32768", "--step-tokens", "65536")
    return [
        checks("fp8", "tests/gpu/test_fp8.py", most=55, call=2),
        checks("graphs-fp8", "tests/gpu/test_graphs.py", "-k", "fp8", most=25, call=2),
        bench("bench-1b", "--models", "1b", *slots, "--no-peers", "--rounds", "5", most=40, call=2),
        checks("training", "tests/gpu/test_training.py", most=55, call=2),
    ]


def _the_rest() -> list[Stage]:
    every = ("--models", *ALL_SIZES, "--objectives", "mlm", "clm", "--precisions", "bf16", "fp8")
    profiled = ("--models", "1b", "--no-peers", "--rounds", "1", "--profile", TRACES)
    both = ("precision=bf16", "precision=bf16,deterministic=true")
    return [
        checks("graphs-clm", "tests/gpu/test_graphs.py", "-k", "bit and CausalLM", most=60),
        checks("checkpoint", "tests/gpu/test_checkpoint.py", most=90),
        checks("deterministic", "tests/gpu/test_deterministic.py", most=180),
        checks("layouts", "tests/gpu/test_layouts.py", most=120),
        checks("parity-large", "tests/gpu/test_model.py", "-k", LARGE, most=360),
        bench("bench-all", *every, "--rounds", "5", most=600),
        bench("profile-1b", *profiled, most=90),
        compare("determinism", "17m", *both, most=120),
        compare("fp8-curves", "400m", "precision=bf16", "precision=fp8", most=240),
    ]


def corpus_commands(texts: Sequence[str]) -> list[tuple[str, ...]]:
    """Return how the quickstart's corpora are made of text files: one each, or one for both."""
    train = ("--input", *texts, "--vocab-size", "8192", "--output", str(TOKENIZER))
    made: list[tuple[str, ...]] = [("tools/train_tokenizer.py", *train)]
    for name, text in zip(SOURCES, (texts[0], texts[-1]), strict=True):
        paths = ("--tokenizer", str(TOKENIZER), "--output-prefix", str(TOKENS / name))
        arguments = ("--input", text, *paths, "--validation-share", "0.02")
        made.append(("tools/preprocess_data.py", *arguments))
    return made


def has_corpus(root: Path) -> bool:
    """Tell whether the files that examples/data/quickstart.yaml names are below `root`."""
    parts = [
        TOKENS / f"{name}_text_{part}{suffix}"
        for name in SOURCES
        for part in ("document", "validation")
        for suffix in (".bin", ".idx")
    ]
    return all((root / path).is_file() for path in (TOKENIZER / "tokenizer.json", *parts))


def allowance(stage: Stage, seconds_left: float) -> int | None:
    """Return the seconds that a stage may take of those left; None if it is not worth a start."""
    seconds = int(min(stage.most_seconds, seconds_left))
    return seconds if seconds >= stage.least_seconds else None


def plan(chosen: Sequence[Stage]) -> str:
    """Return the stages with their processes and times, for people."""
    lines, spent = [], 0
    for stage in chosen:
        spent += stage.most_seconds
        call = f"call {stage.call}" if stage.call else ""
        lines.append(
            f"{stage.name:18} {stage.process:11} {call:7} {stage.most_seconds:4} s, {spent:5} s"
        )
    return "\n".join(lines)
