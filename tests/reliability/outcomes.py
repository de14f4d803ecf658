"""What a run leaves when it has ended, without times, and in what two runs differ."""

from __future__ import annotations

import contextlib
import filecmp
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.order.ledger import RECORD, Ledger
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.verify import verify

#: Folder of the second place, beside that of the run.
COPIES = "copies"
#: Numbers of a report that no two runs share.
TIMES = {
    "seconds",
    "tokens_per_second",
    "optimizer_share",
    "peak_memory_bytes",
    "save_seconds",
    "save_stall_seconds",
    "rank_seconds_min",
    "rank_seconds_median",
    "rank_seconds_max",
    "slowest_rank",
    "slowest_host",
}
#: Files of a checkpoint that no two runs share: one has the tokenizer's absolute path, and torch
#: puts random names into the other.
UNLIKE = {"model.json", ".metadata"}


@dataclass(frozen=True)
class Outcome:
    """All that a run leaves, without times."""

    files: set[str]
    reports: list[dict[str, Any]]
    steps: list[tuple[Any, ...]]
    checkpoints: dict[str, dict[str, str]]
    """Digests of the files of a checkpoint, by its name."""
    row_losses: bytes
    """The losses of all rows, as their file has them."""


def outcome_of(folder: Path) -> Outcome:
    """Read a run that has ended."""
    run = RunFolder(folder / "run")
    columns = [name for name in RECORD.names or () if name not in ("seq", "unix_ns", "chain")]
    return Outcome(
        files={
            str(path.relative_to(folder))
            for top in (run.path, folder / COPIES, folder / "corpus")
            for path in top.rglob("*")
            if path.name != "forks" and not path.name.startswith("fork_")
        },
        reports=[
            {name: value for name, value in report.items() if name not in TIMES}
            # The line of a checkpoint comes when its files are written, at one step or another.
            for report in sorted(run.read_metrics(), key=lambda line: (line["step"], line["kind"]))
        ],
        steps=[
            tuple(np.asarray(step[name]).tolist() for name in columns)
            for step in Ledger.read(run.ledger).steps
        ],
        checkpoints={
            path.name: {
                name: digest["sha256"]
                for name, digest in json.loads((path / "state.json").read_text())["files"].items()
                if name not in UNLIKE
            }
            for path in run.complete_checkpoints()
        },
        row_losses=run.row_losses.read_bytes(),
    )


def differences(found: Outcome, expected: Outcome) -> list[str]:
    """Return in what two runs differ."""
    faults = [f"left {name}" for name in sorted(found.files - expected.files)]
    faults += [f"lacks {name}" for name in sorted(expected.files - found.files)]
    for what in ("reports", "steps"):
        mine, theirs = getattr(found, what), getattr(expected, what)
        if mine != theirs:
            faults.append(f"{what} differ: {mine} and {theirs}")
    if found.row_losses != expected.row_losses:
        faults.append("losses of rows differ")
    for name, digests in found.checkpoints.items():
        theirs = expected.checkpoints.get(name, {})
        unlike = [each for each in digests | theirs if digests.get(each) != theirs.get(each)]
        faults += [f"{name}: {each} is another file" for each in unlike]
    return faults


def faults_of(folder: Path, expected: Outcome) -> list[str]:
    """Return what is wrong with a run that has ended."""
    with contextlib.chdir(folder):
        found = verify(Path("run"), share=1.0, weights=True)
    faults = [fault.what for fault in found.faults] + found.changes
    if not found.passed:
        faults.append(f"verify says {found.verdict}")
    return faults + copy_faults(folder) + differences(outcome_of(folder), expected)


def copy_faults(folder: Path) -> list[str]:
    """Return the files of checkpoints whose copies in the second place have other bytes."""
    run = folder / "run"
    return [
        f"{path.relative_to(folder)}: its copy is another file"
        for path in sorted(RunFolder(run).checkpoints.rglob("*"))
        if path.is_file()
        and not filecmp.cmp(path, folder / COPIES / path.relative_to(run), shallow=False)
    ]
