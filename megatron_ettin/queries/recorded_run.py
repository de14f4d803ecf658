"""A run opened for questions: its order, its ledger, its steps and its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from megatron_ettin.config import RunConfig
from megatron_ettin.data.orders import open_order
from megatron_ettin.order import NotRecordedError, Order, SampleOrder
from megatron_ettin.order.corpora import OtherShardsError
from megatron_ettin.order.interventions import SkippedRows, read_interventions
from megatron_ettin.order.ledger import Ledger
from megatron_ettin.order.mcore import FORMAT, McoreOrder, McoreRun
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.order.spec import OrderSpec
from megatron_ettin.order.steps import plan_steps
from megatron_ettin.queries.record import spec_differences

#: Rows whose tokens are counted at a time.
CHUNK_ROWS = 16_384
#: Differences between the recorded order and today's that an error lists.
CHANGES_SHOWN = 12


@dataclass(frozen=True)
class CheckpointPoint:
    """Checkpoint after step `step`, trained on rows [0, g)."""

    name: str
    step: int
    g: int


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A run as its folder records it; all answers are computed from this."""

    folder: Path
    order: Order
    config: RunConfig | None
    """None for a run that Megatron trained; `config_for` raises then."""
    ledger: Ledger
    """Without records before the first step, and for a run that Megatron trained."""
    done: NDArray[np.int64]
    """Rows [begin, end) of each step that the run has taken, [n, 2]."""
    checkpoints: list[CheckpointPoint]
    """Checkpoints, by ascending step."""
    recorded: dict[str, Any]
    """Fields of order.json (`OrderSpec.to_dict`), or what describes a run of Megatron."""
    changes: list[str]
    """Differences between the recorded order and that of today's files."""

    @property
    def steps_done(self) -> int:
        """Number of steps that the run has taken."""
        return len(self.done)

    @property
    def end_g(self) -> int:
        """First row after the steps that the run has taken."""
        return int(self.done[-1, 1]) if len(self.done) else 0

    @property
    def num_steps(self) -> int:
        """Number of steps of the whole run, future ones included."""
        return len(self._steps)

    def config_for(self, what: str, remedy: str = "") -> RunConfig:
        """Return the run's configuration, from which `what` (a plural noun) follows.

        Raises:
            NotRecordedError: Megatron trained the run; the message names `what` and the remedy.
        """
        if self.config is None:
            raise NotRecordedError(self.folder, what, remedy)
        return self.config

    @property
    def allows_other_tokenizers(self) -> bool:
        """True if the configuration lets corpora have several tokenizers."""
        return self.config is not None and self.config.data.allow_other_tokenizers

    def tokens_of_steps(self, first: int, last: int) -> NDArray[np.int64]:
        """Return the tokens [n] of each of the steps first to last, inclusive, that were taken."""
        if last < first or last <= len(self.ledger.steps):
            return self.ledger.steps["n_tokens"][first - 1 : last].astype(np.int64)
        counts = np.zeros(last - first + 1, dtype=np.int64)
        begin, end = int(self.done[first - 1, 0]), int(self.done[last - 1, 1])
        for chunk in range(begin, end, CHUNK_ROWS):
            g = np.arange(chunk, min(chunk + CHUNK_ROWS, end), dtype=np.int64)
            tokens = self.order.row_tokens(chunk, chunk + len(g))
            np.add.at(counts, self.steps_of_rows(g) - first, tokens)
        return counts

    def rows_of_step(self, step: int) -> tuple[int, int]:
        """Return the rows [begin, end) of a step, counted from 1.

        Raises:
            ValueError: the run has no such step.
        """
        steps = self.done if step <= self.steps_done else self._steps
        if not 1 <= step <= len(steps):
            raise ValueError(f"{self.folder}: has steps 1 to {self.num_steps}, not {step}")
        begin, end = steps[step - 1].tolist()
        return begin, end

    def steps_of_rows(self, g: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the step [m] of each row [m]; 0 if the row is skipped."""
        # Future steps take a while to compute, and rows of the past do not need them.
        steps = self.done if len(g) and g.max() < self.end_g else self._steps
        index = np.searchsorted(steps[:, 0], g, side="right") - 1
        inside = (index >= 0) & (g < steps[np.maximum(index, 0), 1])
        return np.where(inside, index + 1, 0)

    def checkpoint(self, name: str) -> CheckpointPoint:
        """Return a checkpoint by its name, or by its step in decimal; "0" is the start of the run.

        Raises:
            ValueError: no such checkpoint; the message lists those that exist.
        """
        if name == "0":
            return CheckpointPoint("start", 0, 0)
        for point in self.checkpoints:
            if name in (point.name, str(point.step)):
                return point
        known = ", ".join(point.name for point in self.checkpoints) or "none"
        raise ValueError(f"{self.folder}: no checkpoint {name!r}; there are: {known} (and 0)")

    def checkpoint_after(self, g: int) -> CheckpointPoint | None:
        """Return the first checkpoint that was trained on row `g`; None if there is none yet."""
        return next((point for point in self.checkpoints if point.g > g), None)

    @cached_property
    def _steps(self) -> NDArray[np.int64]:
        """Rows [n, 2] of every step; future ones are computed from the configuration."""
        if self.config is None:
            return self.done
        g = phase_tokens = 0
        if len(self.ledger.steps):
            last = self.ledger.steps[-1]
            g = int(self.ledger.records["g_end"][-1])
            in_phase = self.ledger.steps[self.ledger.steps["phase"] == last["phase"]]
            phase_tokens = int(in_phase["n_tokens"].sum())
        skipped = SkippedRows(
            self.config.data.skip_rows,
            read_interventions(RunFolder(self.folder).ledger),
            self.order.spec,
        )
        planned = plan_steps(
            self.order,
            self.config.phases,
            skipped.ranges,
            g=g,
            phase_tokens=phase_tokens,
        )
        to_come = np.array(list(planned), dtype=np.int64).reshape(-1, 2)
        return np.concatenate([self.done, to_come])


def open_run(folder: Path, *, must_match: bool = True) -> RecordedRun:
    """Open the folder of a run of this project, or the description of one that Megatron trained.

    Raises:
        ValueError, OSError: a file, which the message names, is missing or damaged; with
            `must_match` also if today's corpora do not give the recorded order.
    """
    path = RunFolder(folder).config
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --run takes the run_dir of a run")
    document = yaml.safe_load(path.read_text())
    if isinstance(document, dict) and document.get("order") == FORMAT:
        return _open_mcore(folder)
    run = _open_own(RunFolder(folder), must_match=must_match)
    if must_match and run.changes:
        shown = [f"  {change}" for change in run.changes[:CHANGES_SHOWN]]
        if more := len(run.changes) - len(shown):
            shown.append(f"  and {more} more")
        raise ValueError(
            f"{folder}: the order is not the recorded one any more; restore the files, or ask "
            f"`verify` which steps they change:\n" + "\n".join(shown)
        )
    return run


def _open_own(folder: RunFolder, *, must_match: bool) -> RecordedRun:
    config = folder.read_config()
    # Altered or not: the content is compared.
    spec = folder.read_order(check_ids=False)
    order, other_shards = _open_order(config, spec, must_match=must_match)
    recorded = spec.to_dict()
    ledger = folder.read_ledger() if folder.has_ledger() else Ledger.empty(folder.ledger)
    columns = (ledger.steps["g_begin"], ledger.steps["g_end"])
    return RecordedRun(
        folder=folder.path,
        order=order,
        config=config,
        ledger=ledger,
        done=np.stack(columns, axis=1).astype(np.int64),
        checkpoints=[
            CheckpointPoint(point.payload["name"], point.step, point.g)
            for point in ledger.checkpoints()
        ],
        recorded=recorded,
        changes=other_shards
        + [
            f"{change.where}: {change.field} was {change.first}, is {change.second}"
            for change in spec_differences(recorded, order.spec.to_dict())
        ],
    )


def _open_order(
    config: RunConfig, recorded: OrderSpec, *, must_match: bool
) -> tuple[SampleOrder, list[str]]:
    """Return the order of today's files, and what is wrong with their shards."""
    try:
        return open_order(config, recorded), []
    except OtherShardsError as error:
        if must_match:
            raise
        return open_order(config), [str(error)]


def _open_mcore(folder: Path) -> RecordedRun:
    run = McoreRun.read(folder)
    steps = [run.schedule.rows_of_step(step) for step in range(1, run.train_steps + 1)]
    return RecordedRun(
        folder=folder,
        order=McoreOrder(run),
        config=None,
        ledger=Ledger.empty(RunFolder(folder).ledger),
        done=np.array(steps, dtype=np.int64).reshape(-1, 2),
        checkpoints=[
            CheckpointPoint(f"iter_{step:07d}", step, run.schedule.rows_of_step(step)[1])
            for step in run.checkpoints
        ],
        recorded=run.to_dict(),
        changes=[],
    )
