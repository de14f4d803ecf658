"""Start a process for each loader and measurement, with the interpreter that has its packages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.loaders.contest import AT_HOME

ROOT = Path(__file__).parents[2]


def measure(
    names: Sequence[str], folder: Path, *, cases: int, megabytes: int, rivals_python: str
) -> dict[str, Any]:
    """Run the cases of the loaders that are installed; return their versions and costs by name."""
    costs: dict[str, Any] = {}
    for name in names:
        python = sys.executable if name in AT_HOME else rivals_python
        versions = _run(python, "versions", name, folder)
        if versions is None:
            print(f"{name}: left out, its packages are not installed for {python}", flush=True)
            continue
        print(f"{name}: {versions}", flush=True)
        if _run(python, "cases", name, folder, "--cases", str(cases)) is None:
            raise RuntimeError(f"{name}: its cases ended with an error; the lines above say which")
        saved = folder / f"{name}.cost-{megabytes}.json"
        if not saved.exists():
            saved.write_text(json.dumps(_cost(python, name, folder / "text" / name, megabytes)))
        costs[name] = {**json.loads(versions), **json.loads(saved.read_text())}
    return costs


def _cost(python: str, name: str, folder: Path, megabytes: int) -> dict[str, float]:
    """Write a text, then measure a first process over it, and another."""
    written = _run(python, "text", name, folder, "--megabytes", str(megabytes))
    first = _run(python, "cost", name, folder)
    second = _run(python, "cost", name, folder)
    if written is None or first is None or second is None:
        raise RuntimeError(f"{name}: its cost could not be measured")
    cold = json.loads(first)["first_batch_cpu_s"]
    return {**json.loads(written), **json.loads(second), "cold_first_batch_cpu_s": cold}


def _run(python: str, what: str, name: str, folder: Path, *options: str) -> str | None:
    """Return the last line that a process prints; None if it ends with an error."""
    command = [python, "-m", "benchmarks.loaders.contest", what, name, str(folder.resolve())]
    quiet = subprocess.DEVNULL if what == "versions" else None
    done = subprocess.run(
        [*command, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=quiet,
        text=True,
        check=False,
    )
    return (done.stdout.splitlines() or [""])[-1] if done.returncode == 0 else None
