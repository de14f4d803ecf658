"""Curves of runs over tokens: the lines of metrics.jsonl, and the marks of the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.order.ledger import Kind, Ledger
from megatron_ettin.order.run_folder import RunFolder

MarkKind = Literal["checkpoint", "fork", "skip"]
Points = NDArray[np.float64]
#: Share of a run's reports that a smoothed point is the mean of.
SMOOTHED_SHARE = 0.02


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something that happened between two steps."""

    kind: MarkKind
    step: int
    tokens: int
    """Tokens trained on before it."""
    text: str


@dataclass(frozen=True, kw_only=True)
class PhaseStretch:
    """A phase as it was trained: its name, and the tokens at its ends."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class RunCurves:
    """Reports and marks of a run, in order of tokens."""

    name: str
    training: Sequence[Mapping[str, Any]]
    """Lines of metrics.jsonl about training intervals, at least one."""
    validation: Sequence[Mapping[str, Any]]
    """Lines of metrics.jsonl about held-out losses."""
    marks: Sequence[Mark]
    warm_up: Sequence[tuple[int, float]] = ()
    """Tokens and learning rates before the first report."""
    unigram: float | None = None
    """Held-out loss of the training text's token frequencies alone; None if unknown."""

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return int(self.training[-1]["tokens"])

    @property
    def seconds(self) -> float:
        """Time of the steps, without validation and checkpoints."""
        return float(sum(line["seconds"] for line in self.training))

    @property
    def phases(self) -> tuple[PhaseStretch, ...]:
        """Phases; a report names the phase that it ends in, so a phase reaches to its last one."""
        found: list[PhaseStretch] = []
        for name, lines in groupby(self.training, lambda line: str(line["phase"])):
            begin = found[-1].end if found else 0
            found.append(PhaseStretch(name=name, begin=begin, end=int(list(lines)[-1]["tokens"])))
        return tuple(found)

    def series(self, field: str) -> tuple[Points, Points]:
        """Return tokens and values of a field; lines without it are left out."""
        lines = self.validation if field.startswith("heldout") else self.training
        chosen = [(line["tokens"], line[field]) for line in lines if field in line]
        points = np.array(chosen, dtype=np.float64).reshape(-1, 2)
        return points[:, 0], points[:, 1]

    def learning_rates(self) -> tuple[Points, Points]:
        """Return tokens and learning rates, from the first step on."""
        tokens, rates = self.series("lr")
        before = np.array(self.warm_up, dtype=np.float64).reshape(-1, 2)
        return np.concatenate([before[:, 0], tokens]), np.concatenate([before[:, 1], rates])

    def loss_at(self, tokens: int) -> float:
        """Return the smoothed training loss at a number of tokens."""
        at, losses = self.series("loss")
        return float(np.interp(tokens, at, smoothed(losses)))


def smoothed(values: Points) -> Points:
    """Return means over the neighbours of each value, `SMOOTHED_SHARE` of all; fewer at the ends.

    A window at an end shrinks on both sides, so that a falling curve is not shifted there.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    most = int(len(values) * SMOOTHED_SHARE / 2)
    reach = np.minimum(most, np.minimum(places, places[::-1]))
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def read_curves(name: str, folder: Path) -> RunCurves:
    """Read a run's folder, also while the run goes on.

    Raises:
        ValueError: no report is there, one is no JSON, or the ledger is damaged.
        OSError: a file cannot be read.
    """
    run = RunFolder(folder)
    if not run.metrics.is_file():
        raise ValueError(f"{run.metrics}: no such file; give the run_dir of a run")
    lines = run.read_metrics()
    training = [line for line in lines if line["kind"] == "train"]
    if not training:
        raise ValueError(f"{run.metrics}: no line of training yet")
    ledger = run.read_ledger() if run.has_ledger() else Ledger.empty(run.ledger)
    return RunCurves(
        name=name,
        training=training,
        validation=[line for line in lines if line["kind"] == "validation"],
        marks=read_marks(ledger),
        warm_up=_warm_up(run, ledger, training[0]),
    )


def _warm_up(run: RunFolder, ledger: Ledger, first: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Return the corners of the learning rate before the first report: it rises from 0.

    Nothing without a ledger, a configuration or a warm-up.
    """
    if not len(ledger.steps) or not run.config.is_file():
        return []
    optimizer = (config := run.read_config()).optimizer
    begin, end = int(ledger.steps["n_tokens"][0]), int(first["tokens"])
    if optimizer.warmup_tokens <= 0 or begin >= end:
        return []
    corners = [(begin, 0.0)]
    if begin < optimizer.warmup_tokens < end:
        corners.append((optimizer.warmup_tokens, optimizer.lr * config.phases[0].lr_start))
    return corners


def read_marks(ledger: Ledger) -> list[Mark]:
    """Return checkpoints, forks and skips of a ledger, in its order."""
    records = ledger.records
    is_step = records["kind"] == Kind.STEP
    tokens = np.cumsum(np.where(is_step, records["n_tokens"], 0), dtype=np.int64)
    marks = []
    for index in np.flatnonzero(~is_step).tolist():
        record, kind = records[index], Kind(int(records["kind"][index]))
        payload = ledger.events.get(int(record["seq"]), {})
        begin, end = int(record["g_begin"]), int(record["g_end"])
        told: dict[Kind, tuple[MarkKind, str]] = {
            Kind.CHECKPOINT: ("checkpoint", f"checkpoint {payload.get('name')}"),
            Kind.FORK: ("fork", f"resumed from here: {payload.get('steps')} steps were undone"),
            Kind.SKIP: (
                "skip",
                f"rows {begin:,} to {end - 1:,} were skipped ({payload.get('reason')})",
            ),
        }
        if kind in told:
            name, text = told[kind]
            step, before = int(record["step"]), int(tokens[index])
            marks.append(Mark(kind=name, step=step, tokens=before, text=text))
    return marks


def named_folders(arguments: Sequence[str]) -> dict[str, Path]:
    """Return run folders by name, from FOLDER or NAME=FOLDER.

    A folder's own name is that of the run, with as many of the folders above it as it takes to
    tell the runs apart.

    Raises:
        ValueError: two runs have one name, or a folder is given twice.
    """
    named: list[tuple[str | None, Path]] = []
    for argument in arguments:
        given_name, _, given_folder = argument.partition("=")
        is_named = bool(given_name and given_folder) and not Path(argument).is_dir()
        named.append((given_name, Path(given_folder)) if is_named else (None, Path(argument)))
    parts = [folder.resolve().parts for given, folder in named if given is None]
    if len(set(parts)) < len(parts):
        raise ValueError("a run is given twice; NAME=FOLDER gives it a second name")
    found: dict[str, Path] = {}
    for given, folder in named:
        name = _shortest_name(folder.resolve().parts, parts) if given is None else given
        if name in found:
            raise ValueError(f"two runs are called {name!r}; give NAME=FOLDER")
        found[name] = folder
    return found


def _shortest_name(own: tuple[str, ...], every: Sequence[tuple[str, ...]]) -> str:
    """Return the fewest last parts of a path that no other path ends in."""
    count = 1
    while sum(parts[-count:] == own[-count:] for parts in every) > 1:
        count += 1
    return "/".join(own[-count:])
