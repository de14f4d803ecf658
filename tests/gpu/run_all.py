"""Check and measure everything on one GPU, in stages, the most telling first: run_all.sh's work.

A stage that fails or takes too long never stops the next. DIR/results.jsonl gets a line a stage,
DIR/log.txt what each of them printed, DIR/profiles/ the traces. Standard library only, so that it
can say which packages are missing.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
#: What the stages import, besides this project and, where it is installed, Transformer Engine.
NEEDED = (
    "docstring_parser",
    "hypothesis",
    "jsonargparse",
    "megatron.core",
    "numpy",
    "psutil",
    "pyarrow",
    "pybind11",
    "pytest",
    "safetensors",
    "setuptools",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "triton",
    "typeshed_client",
    "yaml",
    "zstandard",
)
TOKENIZER, TOKENS = Path("quickstart/tokenizer"), Path("quickstart/tokens")
#: The sources of examples/data/quickstart.yaml.
SOURCES = ("reviews", "wikipedia")
NO_CORPUS = "no corpus in quickstart/: make it with `make quickstart`, or give --text FILE..."
NO_TIME = "not enough time was left"
#: The exit code of a stage that ran out of time, as timeout(1) has it.
OUT_OF_TIME = 124
GRACE_SECONDS = 10
ALL_SIZES = ("17m", "32m", "68m", "150m", "400m", "1b")
LARGE = "32m or 68m or 400m or 1b"


@dataclass(frozen=True)
class Stage:
    """A command, and the time it may take."""

    name: str
    command: tuple[str, ...]
    """Arguments of Python; PROFILES stands for the folder of traces."""
    most_seconds: int
    least_seconds: int = 20
    """With less than that left it is not started."""
    needs_corpus: bool = False

    @property
    def is_tests(self) -> bool:
        """Tell whether it is run by pytest, which writes a report."""
        return self.command[:2] == ("-m", "pytest")


def tests(name: str, *arguments: str, most: int) -> Stage:
    """Return a stage of tests; a warning of another version of a package is no failure."""
    options = ("-m", "pytest", "-v", "-W", "default", "-p", "no:cacheprovider")
    return Stage(name, (*options, *arguments), most)


def bench(name: str, *arguments: str, most: int, least: int = 60) -> Stage:
    """Return a stage of tools/bench_train.py."""
    command = ("tools/bench_train.py", *arguments, "--device", "cuda", "--json")
    return Stage(name, command, most, least, needs_corpus=True)


def compare(name: str, model: str, *settings: str, most: int) -> Stage:
    """Return a stage that trains one run under several settings of the hardware section."""
    command = ("-m", "tests.gpu.compare_settings", model, *settings)
    return Stage(name, command, most, 60, needs_corpus=True)


def profile(model: str, most: int) -> Stage:
    """Return a stage that traces a few steps."""
    run = ("--models", model, "--objectives", "mlm", "--precisions", "bf16", "--rounds", "1")
    return bench(f"profile-{model}", *run, "--no-peers", "--profile", "PROFILES", most=most)


def stages() -> list[Stage]:
    """Return all of them; the first five take a few minutes together."""
    kernels = sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests/unit").glob("test_*.py")
        if "pytest.mark.gpu" in path.read_text()
    )
    bf16 = ("--objectives", "mlm", "--precisions", "bf16")
    short = ("--rounds", "3", "--no-peers")
    model = "tests/gpu/test_model.py"
    return [
        Stage("native", ("setup.py", "build_ext", "--inplace"), 240),
        Stage("environment", ("-m", "tests.gpu.environment"), 45),
        tests("kernels", "-m", "gpu", *kernels, most=70),
        Stage("bench-attention", ("tools/bench_attention.py", "--json"), 60),
        tests("model-small", model, "-k", f"not ({LARGE})", most=125),
        bench("bench-short", "--models", "17m", "150m", "1b", *bf16, *short, most=240),
        tests("hot-path", "tests/gpu/test_hot_path.py", most=60),
        tests("graphs", "tests/gpu/test_graphs.py", most=120),
        bench(
            "bench-graphs",
            *("--models", "17m", "32m", "68m", "150m", *bf16, *short, "--cuda-graphs"),
            most=240,
        ),
        tests("fp8", "tests/gpu/test_fp8.py", most=120),
        tests("training", "tests/gpu/test_training.py", most=120),
        tests("checkpoint", "tests/gpu/test_checkpoint.py", most=90),
        tests("deterministic", "tests/gpu/test_deterministic.py", most=180),
        tests("layouts", "tests/gpu/test_layouts.py", most=120),
        tests("model-large", model, "-k", LARGE, most=360),
        bench(
            "bench-all",
            *("--models", *ALL_SIZES, "--objectives", "mlm", "clm"),
            *("--precisions", "bf16", "fp8", "--rounds", "5"),
            most=600,
            least=120,
        ),
        profile("17m", most=60),
        profile("1b", most=90),
        compare(
            "determinism", "17m", "precision=bf16", "precision=bf16,deterministic=true", most=120
        ),
        compare("fp8-curves", "400m", "precision=bf16", "precision=fp8", most=240),
    ]


def corpus_stages(texts: Sequence[str]) -> list[Stage]:
    """Return how the quickstart's corpora are made of text files: one each, or one for both."""
    train = ("--input", *texts, "--vocab-size", "8192", "--output", str(TOKENIZER))
    made = [Stage("tokenizer", ("tools/train_tokenizer.py", *train), 300)]
    for name, text in zip(SOURCES, (texts[0], texts[-1]), strict=True):
        paths = ("--tokenizer", str(TOKENIZER), "--output-prefix", str(TOKENS / name))
        arguments = ("--input", text, *paths, "--validation-share", "0.02")
        made.append(Stage(f"tokens-{name}", ("tools/preprocess_data.py", *arguments), 300))
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


def missing_imports(names: Sequence[str]) -> list[str]:
    """Return which of these modules cannot be found; packages of dotted ones are imported."""
    return [name for name in names if not _is_found(name)]


def _is_found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that a dotted name is in
        return False


def allowance(stage: Stage, seconds_left: float) -> int | None:
    """Return the seconds that a stage may take of those left; None if it is not worth a start."""
    seconds = int(min(stage.most_seconds, seconds_left))
    return seconds if seconds >= min(stage.least_seconds, stage.most_seconds) else None


def reported(xml: str) -> dict[str, Any]:
    """Return from pytest's report: counts, and what tests recorded, by test."""
    cases = list(ElementTree.fromstring(xml).iter("testcase"))

    def named(tag: str) -> list[str]:
        return [str(case.get("name")) for case in cases if case.find(tag) is not None]

    failed, skipped = named("failure") + named("error"), named("skipped")
    measured = {
        str(case.get("name")): {p.get("name"): p.get("value") for p in case.iter("property")}
        for case in cases
        if case.find("properties") is not None
    }
    passed = len(cases) - len(failed) - len(skipped)
    return {"passed": passed, "failed": failed, "skipped": len(skipped), "measured": measured}


def printed(output: str) -> Any:
    """Return the JSON object on the last line of an output; None if there is none."""
    last = output.rstrip().rpartition("\n")[2]
    try:
        found = json.loads(last)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def run_stage(stage: Stage, seconds: int, folder: Path) -> dict[str, Any]:
    """Run a stage for at most `seconds`; append what it printed to the log, return its record."""
    with tempfile.TemporaryDirectory() as scratch:
        report, traces = Path(scratch, "report.xml"), Path(scratch, "profiles")
        command = [str(traces) if word == "PROFILES" else word for word in stage.command]
        if stage.is_tests:
            command.append(f"--junitxml={report}")
        begin = time.monotonic()
        code, output = run([sys.executable, *command], seconds)
        record = {
            "name": stage.name,
            "seconds": round(time.monotonic() - begin, 1),
            "exit_code": code,
            "measured": reported(report.read_text()) if report.exists() else printed(output),
        }
        keep_traces(traces, folder / "profiles")
    with (folder / "log.txt").open("a") as log:
        log.write(f"\n===== {stage.name}: exit code {code}, {record['seconds']} s\n{output}\n")
    return record


def run(command: Sequence[str], seconds: int) -> tuple[int, str]:
    """Run a command in a session of its own; return its exit code and all that it printed.

    When the time is up it is interrupted, so that tests end what they have started and pytest
    writes its report; a little later the whole session is killed.
    """
    # What a program handles, its children start with; what it ignores, as a shell's background job
    # does interrupts, they would ignore too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = OUT_OF_TIME
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.seek(0)
        return code, file.read()


def keep_traces(traces: Path, folder: Path) -> None:
    """Pack the traces that a stage left, if any, into `folder`."""
    for trace in sorted(traces.rglob("*.json")) if traces.exists() else ():
        folder.mkdir(exist_ok=True)
        name = "-".join(trace.relative_to(traces).parts)
        with trace.open("rb") as source, gzip.open(folder / f"{name}.gz", "wb") as packed:
            shutil.copyfileobj(source, packed)


def line(record: dict[str, Any]) -> str:
    """Return a stage's line of the table."""
    if "skipped" in record:
        return f"{record['name']:14} {'':>7}  skipped: {record['skipped']}"
    code, found = record["exit_code"], record["measured"] or {}
    verdict = {0: "ok", OUT_OF_TIME: "OUT OF TIME"}.get(code, f"FAILED ({code})")
    if "passed" in found:
        verdict += f"; {found['passed']} passed, {len(found['failed'])} failed, "
        verdict += f"{found['skipped']} skipped"
    return f"{record['name']:14} {record['seconds']:6.0f}s  {verdict}"


def main() -> None:
    """Run the stages that were asked for; exit with 1 if one of them failed."""
    arguments = parse_arguments()
    if missing := missing_imports(NEEDED):
        sys.exit(
            f"error: cannot be imported here: {', '.join(missing)}: give --wheels a folder of "
            f"wheels that has them (pyproject.toml names the packages), --te-bundle Megatron-Core"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60.0 * arguments.minutes
    # What is compiled already is not compiled again.
    chosen = [stage for stage in stages() if stage.name in {"native", *arguments.stages}]
    if not has_corpus(ROOT) and arguments.text:
        chosen[1:1] = corpus_stages([str(Path(text).absolute()) for text in arguments.text])
    lines = []
    for stage in chosen:
        seconds = allowance(stage, end - time.monotonic())
        record: dict[str, Any] = {"name": stage.name}
        if stage.needs_corpus and not has_corpus(ROOT):
            record["skipped"] = NO_CORPUS
        elif seconds is None:
            record["skipped"] = NO_TIME
        else:
            record = run_stage(stage, seconds, arguments.out)
        with (arguments.out / "results.jsonl").open("a") as results:
            results.write(json.dumps(record) + "\n")
        lines.append(line(record))
        print(lines[-1], flush=True)
    (arguments.out / "summary.txt").write_text("\n".join(lines) + "\n")
    sys.exit(int(any("FAILED" in text or "OUT OF TIME" in text for text in lines)))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="run_all.sh", description=__doc__)
    names = [stage.name for stage in stages()]
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="default: runs/gpu")
    add("--minutes", type=float, default=25.0, metavar="N", help="for all stages; default: 25")
    stages_help = f"of {', '.join(names)}; default: all"
    add("--stages", nargs="+", choices=names, default=names, metavar="NAME", help=stages_help)
    text_help = (
        "text of which a missing corpus is made: .jsonl, .txt, ... (tools/preprocess_data.py)"
    )
    add("--text", nargs="+", metavar="FILE", help=text_help)
    return parser.parse_args()


if __name__ == "__main__":
    main()
