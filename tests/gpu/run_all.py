"""Check and measure on one GPU, in stages, the most telling first: run_all.sh's work.

DIR/results.jsonl gets a line for each test and each figure the moment it exists, and one for each
stage; DIR/log.txt all that was printed, DIR/profiles/ the traces. A stage that fails never stops
the next. Standard library only, so that it can say which packages are missing.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.gpu.stages import (
    CALL_SECONDS,
    ROOT,
    TRACES,
    Stage,
    corpus_commands,
    has_corpus,
    plan,
    stages,
)
from tests.gpu.turns import OUT_OF_TIME, Turns

#: What the stages import, besides this project and, where it is installed, Transformer Engine.
NEEDED = (
    "docstring_parser",
    "hypothesis",
    "jsonargparse",
    "megatron.core",
    "msgspec",
    "numpy",
    "psutil",
    "pyarrow",
    "pytest",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "triton",
    "typeshed_client",
    "yaml",
    "zstandard",
)
#: What compiles the extension, where it is not there yet.
NEEDED_TO_BUILD = ("pybind11", "setuptools")
EXTENSION = "megatron_ettin._native"
NO_CORPUS = "no corpus in quickstart/: make it with `make quickstart`, or give --text FILE..."


def missing_imports(names: Sequence[str]) -> list[str]:
    """Return which of these modules cannot be found; packages of dotted ones are imported."""
    return [name for name in names if not _is_found(name)]


def _is_found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that a dotted name is in
        return False


def prepare(texts: Sequence[str] | None, log: Path) -> None:
    """Compile the extension, and make corpora of `texts`, unless they are there.

    Raises:
        subprocess.CalledProcessError: it failed; the log says why.
    """
    commands: list[tuple[str, ...]] = []
    if missing_imports([EXTENSION]):
        commands.append(("setup.py", "build_ext", "--inplace"))
    if texts and not has_corpus(ROOT):
        commands += corpus_commands([str(Path(text).absolute()) for text in texts])
    with log.open("a") as output:
        for command in commands:
            print(f"before the stages: python {' '.join(command)}", flush=True)
            subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                check=True,
                stdout=output,
                stderr=subprocess.STDOUT,
            )


def keep_traces(traces: Path, folder: Path) -> None:
    """Pack the traces that a stage left, if any, into `folder`; remove the originals."""
    for trace in sorted(traces.rglob("*.json")) if traces.exists() else ():
        folder.mkdir(exist_ok=True)
        name = "-".join(trace.relative_to(traces).parts)
        with trace.open("rb") as source, gzip.open(folder / f"{name}.gz", "wb") as packed:
            shutil.copyfileobj(source, packed)
    shutil.rmtree(traces, ignore_errors=True)


def line(record: dict[str, Any]) -> str:
    """Return a stage's line of the table."""
    name = f"{record['stage']:18}"
    if "skipped_because" in record:
        return f"{name} {'':>7}  skipped: {record['skipped_because']}"
    code = record["exit_code"]
    verdict = {0: "ok", OUT_OF_TIME: "OUT OF TIME"}.get(code, f"FAILED ({code})")
    if "passed" in record:
        verdict += f"; {record['passed']} passed, {record['failed']} failed, "
        verdict += f"{record['skipped']} skipped"
    return f"{name} {record['seconds']:6.0f}s  {verdict}"


def run_stages(chosen: Sequence[Stage], folder: Path, end: float) -> list[dict[str, Any]]:
    """Run stages until `end` on the monotonic clock; return and print what became of each."""
    records, traces = [], folder / "traces"
    turns = Turns({stage.process for stage in chosen}, folder)
    try:
        for stage in chosen:
            record: dict[str, Any] = {"stage": stage.name}
            if stage.needs_corpus and not has_corpus(ROOT):
                record["skipped_because"] = NO_CORPUS
            else:
                command = [str(traces) if word == TRACES else word for word in stage.command]
                record |= turns.run(stage, command, end)
                keep_traces(traces, folder / "profiles")
            with (folder / "results.jsonl").open("a") as results:
                results.write(json.dumps(record) + "\n")
            with (folder / "summary.txt").open("a") as summary:
                summary.write(line(record) + "\n")
            print(line(record), flush=True)
            records.append(record)
    finally:
        turns.end()
    return records


def main() -> None:
    """Run the stages that were asked for; exit with 1 if one of them failed."""
    arguments = parse_arguments()
    chosen = [stage for stage in stages() if stage.name in arguments.stages]
    if arguments.call:
        chosen = [stage for stage in chosen if stage.call == arguments.call]
    if arguments.dry_run:
        print(plan(chosen))
        return
    needed = (*NEEDED, *(NEEDED_TO_BUILD if missing_imports([EXTENSION]) else ()))
    if missing := missing_imports(needed):
        sys.exit(
            f"error: cannot be imported here: {', '.join(missing)}: give --wheels a folder of "
            f"wheels that has them (tests/gpu/README.md), --te-bundle Megatron-Core"
        )
    seconds = arguments.seconds or CALL_SECONDS.get(arguments.call, 1500)
    end = time.monotonic() + seconds - arguments.spent
    arguments.out.mkdir(parents=True, exist_ok=True)
    prepare(arguments.text, arguments.out / "log.txt")
    records = run_stages(chosen, arguments.out, end)
    sys.exit(int(any(record.get("exit_code", 0) != 0 for record in records)))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="run_all.sh", description=__doc__)
    names = [stage.name for stage in stages()]
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="default: runs/gpu")
    add("--call", type=int, choices=[1, 2], help="only the stages of a short call")
    seconds_help = "for all stages; default: 480 and 200 with --call 1 and 2, else 1500"
    add("--seconds", type=int, metavar="N", help=seconds_help)
    add("--spent", type=int, default=0, metavar="N", help="seconds of these that have passed")
    stages_help = f"of {', '.join(names)}; default: all"
    add("--stages", nargs="+", choices=names, default=names, metavar="NAME", help=stages_help)
    text_help = (
        "text of which a missing corpus is made: .jsonl, .txt, ... (tools/preprocess_data.py)"
    )
    add("--text", nargs="+", metavar="FILE", help=text_help)
    add("--dry-run", action="store_true", help="name the stages and their times, run nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
