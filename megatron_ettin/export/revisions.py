"""Revisions that a run's checkpoints become: their names, and which of them are averaged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Self

from megatron_ettin import checkpoint, checkpoint_files
from megatron_ettin.checkpoint import RunState
from megatron_ettin.order.ledger import Kind, Ledger
from megatron_ettin.order.run_folder import RunFolder, step_of

logger = logging.getLogger(__name__)

#: Beginnings of the published names, by phase; the first phase of any other name has FIRST_PREFIX.
PREFIXES = {"pretrain": "step", "extension": "ext", "decay": "decay"}
FIRST_PREFIX = "step"
#: Fields of SavedModel that decide what weights compute.
COMPUTING_FIELDS = (
    "model",
    "attention",
    "rotary_base_global",
    "rotary_base_local",
    "prediction_shift",
)


@dataclass(frozen=True, kw_only=True)
class SeriesRevision:
    """Revision of one checkpoint, or of the mean of several."""

    name: str
    checkpoints: tuple[Path, ...]
    """Folders of the checkpoints, in the order of training."""
    averaged: tuple[str, ...] = ()
    """Names of the checkpoints' own revisions, if there are several checkpoints."""

    @property
    def files_sha256(self) -> str:
        """Digest of the checkpoint's files; of an average, of its checkpoints' digests."""
        digests = [checkpoint_files.read_files(folder).sha256 for folder in self.checkpoints]
        if not self.averaged:
            return digests[0]
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


@dataclass(frozen=True)
class Average:
    """Averages to make: of the last `count` checkpoints, or of each window of `tokens`."""

    count: int | None = None
    tokens: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `last:COUNT` or `every:TOKENS`; raise ValueError for anything else."""
        match = re.fullmatch(r"(last|every):([1-9][\d_]*)", text)
        number = int(match[2]) if match else 0
        if match is None or (match[1] == "last" and number < 2):
            raise ValueError(f"{text!r} is neither last:COUNT, of 2 or more, nor every:TOKENS")
        return cls(count=number) if match[1] == "last" else cls(tokens=number)


def list_revisions(run: RunFolder, averages: Sequence[Average]) -> list[SeriesRevision]:
    """Return the revisions of a run's checkpoints in the order of training, then its averages.

    A checkpoint of steps that the run went back on is left out, with a notice in the log.

    Raises:
        ValueError, OSError: no checkpoint, a damaged ledger, two of one name, or no such average.
    """
    ledger, states = run.read_ledger(), {}
    named = {path: step for path in run.complete_checkpoints() if (step := step_of(path))}
    for path in sorted(named, key=lambda path: named[path]):
        state = checkpoint.read_state(path)
        if state.ledger_head is not None and ledger.holds(state.ledger_head):
            states[path] = state
        else:
            logger.warning("notice: %s is not of the run's ledger; it is left out", path)
    if not states:
        raise ValueError(f"{run.path}: no checkpoint of a step here")
    names = {path: revision_name(ledger, state) for path, state in states.items()}
    revisions = [SeriesRevision(name=names[path], checkpoints=(path,)) for path in states]
    is_over = any(record["kind"] == Kind.END for record in ledger.records[-1:])
    for average in averages:
        if average.tokens is None:
            groups = [_last(run, list(states), average.count or 0)]
            label = f"last{average.count}"
        else:
            groups = _windows(states, average.tokens, is_over)
            label = f"every{average.tokens}"
        for group in groups:
            _check_alike(group)
            revisions.append(
                SeriesRevision(
                    name=f"averaged-{label}-{names[group[-1]]}",
                    checkpoints=tuple(group),
                    averaged=tuple(names[path] for path in group),
                )
            )
    _check_names(run, revisions)
    return revisions


def revision_name(ledger: Ledger, state: RunState) -> str:
    """Return the published form of a checkpoint's name: phase, and optimizer steps in the phase."""
    begins = [
        record
        for record in ledger.records[ledger.records["kind"] == Kind.PHASE]
        if record["seq"] < state.ledger_seq
    ]
    if not begins:
        raise ValueError(f"{ledger.folder}: no phase begins before record {state.ledger_seq}")
    is_first = int(begins[-1]["phase"]) == 0
    own = re.sub(r"[^A-Za-z0-9_-]+", "-", state.phase).strip("-") or f"phase{begins[-1]['phase']}-"
    prefix = PREFIXES.get(state.phase, FIRST_PREFIX if is_first else own)
    return f"{prefix}{state.step - int(begins[-1]['step'])}"


def _last(run: RunFolder, paths: list[Path], count: int) -> list[Path]:
    if len(paths) < count:
        raise ValueError(f"{run.path}: {len(paths)} checkpoints, but last:{count} averages {count}")
    return paths[-count:]


def _windows(states: dict[Path, RunState], tokens: int, is_over: bool) -> list[list[Path]]:
    """Return the checkpoints of each window of `tokens` in a phase that has passed, if several.

    A later checkpoint could still fall into the last window of a run that goes on.
    """

    def window(path: Path) -> tuple[str, int]:
        state = states[path]
        return state.phase, -(-state.phase_tokens // tokens)

    groups = [list(group) for _, group in groupby(states, window)]
    last = states[groups[-1][-1]]
    if not is_over and last.phase_tokens % tokens:
        groups.pop()
    found = [group for group in groups if len(group) > 1]
    if not found:
        logger.warning("notice: no window of %d tokens holds two checkpoints", tokens)
    return found


def _check_alike(paths: Sequence[Path]) -> None:
    """Raise ValueError for checkpoints whose models differ in more than weights."""
    first, *others = [dataclasses.asdict(checkpoint.read_model(path)) for path in paths]
    for path, other in zip(paths[1:], others, strict=True):
        if differing := [name for name in COMPUTING_FIELDS if first[name] != other[name]]:
            raise ValueError(
                f"{path}: {differing[0]} is {other[differing[0]]}, but {first[differing[0]]} in "
                f"{paths[0]}: their weights have no mean; average fewer checkpoints"
            )


def _check_names(run: RunFolder, revisions: Sequence[SeriesRevision]) -> None:
    seen: dict[str, SeriesRevision] = {}
    for revision in revisions:
        if revision.name in (*seen, "main"):
            both = [seen[revision.name].checkpoints[-1].name] if revision.name in seen else ["main"]
            raise ValueError(
                f"{run.path}: {revision.checkpoints[-1].name} and {both[0]} would both be the "
                f"revision {revision.name}: the names of their phases give the same beginning"
            )
        seen[revision.name] = revision
