"""Losses of a run's rows, and how far each is from those that it can be compared with.

A row is compared with the rows of its source, and of its objective where a phase has several, in
one stretch of its phase. Losses fall fast at first and slowly later, so stretches grow: each is at
most a tenth of what the phase had before it, once that is longer than the shortest stretch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.objectives import Objective
from megatron_ettin.order.blend import BLEND_PERIOD, sources_of_rows
from megatron_ettin.order.row_losses import RowLossError, RowLossReader
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.order.spread import middle_and_spread
from megatron_ettin.queries.recorded_run import RecordedRun

#: Rows of the shortest stretch, for each source of the phase.
SHORTEST_ROWS = 64
#: Rows before a stretch, in lengths of the stretch.
GROWTH = 10
#: Rows from which the typical losses of a stretch are taken: all, or blocks at equal distances.
SAMPLE_ROWS, BLOCK_ROWS = 65_536, 1024
#: Rows of a group that its typical loss needs.
FEWEST_ROWS = 16
#: Rows that are read at a time: whole periods of a blend, few enough to stay in a core's cache.
CHUNK_ROWS = BLEND_PERIOD


class LossStretch(NamedTuple):
    """Rows [begin, end) of a phase, which are compared with each other."""

    phase: int
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Typical:
    """Typical losses in a stretch by group, [groups]; NaN where a group has too few rows."""

    middles: NDArray[np.float64]
    spreads: NDArray[np.float64]
    """Robust standard deviations; NaN also where more than half of the losses are equal."""

    def z(self, means: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the robust z-scores [n] of the losses [n] of rows of these groups [n]."""
        return (means - self.middles[groups]) / self.spreads[groups]


class RunLosses:
    """Losses of the rows that a run has trained on so far."""

    def __init__(self, run: RecordedRun) -> None:
        """Open the losses of a run.

        Raises:
            NotRecordedError: Megatron trained the run.
            FileNotFoundError: the run keeps no losses.
            RowLossError: the file is damaged, or shorter than the ledger says.
        """
        config = run.config_for("losses of rows")
        path = RunFolder(run.folder).row_losses
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file: the run keeps no losses of rows (logging.row_losses)"
            )
        self.run = run
        self.reader = RowLossReader.open(path)
        recorded = int(run.ledger.records["g_end"][-1]) if len(run.ledger.records) else 0
        self._refuse_short(run)
        self.end_g = min(self.reader.end_g, recorded)
        self.phases = run.order.spec.phases
        self._objectives = [config.objective.for_phase(phase.name) for phase in self.phases]
        self._mask_seed = config.seeds.mask
        self._typical: dict[LossStretch, Typical] = {}

    def _refuse_short(self, run: RecordedRun) -> None:
        bound = [
            point.payload["row_losses"]["g_end"]
            for point in run.ledger.checkpoints()
            if "row_losses" in point.payload
        ]
        if bound and bound[-1] > self.reader.end_g:
            raise RowLossError(
                f"{self.reader.path}: ends before row {self.reader.end_g}, but a checkpoint's "
                f"record has losses up to row {bound[-1]}: restore it"
            )

    def num_groups(self, phase: int) -> int:
        """Return the number of groups of a phase: its sources, times its objectives."""
        return len(self.phases[phase].pools) * self.num_objectives(phase)

    def num_objectives(self, phase: int) -> int:
        """Return the number of objectives that the rows of a phase have."""
        return len(self._objective(phase).row_shares())

    def _objective(self, phase: int) -> Objective:
        return self._objectives[phase]

    def quotas(self, phase: int) -> list[int]:
        """Return the rows of each source of a phase in a period of its blend."""
        return [pool.quota for pool in self.phases[phase].pools]

    def sources(self, phase: int, g: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the index, in the phase, of the source of each of its rows g [n]."""
        return sources_of_rows(self.quotas(phase), g - self.phases[phase].start_g)

    def groups(self, phase: int, g: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the group of each of the rows g [n], n > 0, of a phase."""
        sources = self.sources(phase, g).astype(np.int64)
        count = self.num_objectives(phase)
        if count == 1:
            return sources
        return sources * count + self._objective(phase).choose(g, self._mask_seed)

    def stretches(self, begin: int, end: int) -> Iterator[LossStretch]:
        """Yield the stretches that rows [begin, end) lie in, whole."""
        for index, phase in enumerate(self.phases):
            shortest = SHORTEST_ROWS * len(phase.pools)
            first, last = phase.start_g, min(phase.end_g, self.end_g)
            while first < min(last, end):
                length = max(shortest, (first - phase.start_g) // GROWTH)
                # No short rest: its rows would have nothing to be compared with.
                stop = last if first + length + shortest > last else first + length
                if stop > begin:
                    yield LossStretch(index, first, stop)
                first = stop

    def typical(self, stretch: LossStretch) -> Typical:
        """Return the typical losses of the groups of a stretch."""
        if stretch not in self._typical:
            self._typical[stretch] = self._find_typical(stretch)
        return self._typical[stretch]

    def _find_typical(self, stretch: LossStretch) -> Typical:
        means, groups = [np.empty(0)], [np.empty(0, dtype=np.int64)]
        for begin, end in _sampled(stretch):
            read = self.reader.read(begin, end)
            has_loss = read.tokens > 0
            if has_loss.any():
                means.append(read.means[has_loss])
                groups.append(self.groups(stretch.phase, np.arange(begin, end)[has_loss]))
        count = self.num_groups(stretch.phase)
        all_means, all_groups = np.concatenate(means), np.concatenate(groups)
        middles, spreads = np.full(count, np.nan), np.full(count, np.nan)
        by_group = np.argsort(all_groups, kind="stable")
        ends = np.cumsum(np.bincount(all_groups, minlength=count)).tolist()
        for group, (first, last) in enumerate(itertools.pairwise([0, *ends])):
            if last - first >= FEWEST_ROWS:
                middle, spread = middle_and_spread(all_means[by_group[first:last]])
                middles[group], spreads[group] = middle, spread or np.nan
        return Typical(middles=middles, spreads=spreads)

    def compare(self, g: NDArray[np.int64]) -> Compared:
        """Return the losses of rows g [n], ascending, and the typical ones of their groups."""
        found = Compared.of_nothing(len(g))
        if not len(g):
            return found
        for stretch in self.stretches(int(g[0]), int(g[-1]) + 1):
            here = np.flatnonzero((g >= stretch.begin) & (g < stretch.end))
            for place in here.tolist():
                row = int(g[place])
                read = self.reader.read(row, row + 1)
                groups = self.groups(stretch.phase, g[place : place + 1])
                typical = self.typical(stretch)
                found.means[place] = read.means[0]
                found.tokens[place] = read.tokens[0]
                found.middles[place] = typical.middles[groups[0]]
                found.z[place] = typical.z(read.means, groups)[0]
        return found


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Losses of n rows; NaN where there is no loss, or nothing to compare it with."""

    means: NDArray[np.float64]
    tokens: NDArray[np.int64]
    middles: NDArray[np.float64]
    """Typical loss of the row's group in its stretch."""
    z: NDArray[np.float64]

    @classmethod
    def of_nothing(cls, count: int) -> Compared:
        """Return rows without losses."""
        means, middles, z = (np.full(count, np.nan) for _ in range(3))
        return cls(means=means, tokens=np.zeros(count, dtype=np.int64), middles=middles, z=z)


def _sampled(stretch: LossStretch) -> Iterator[tuple[int, int]]:
    """Yield ranges of the rows that the typical losses of a stretch are taken from."""
    length = stretch.end - stretch.begin
    if length <= SAMPLE_ROWS:
        yield stretch.begin, stretch.end
        return
    blocks = SAMPLE_ROWS // BLOCK_ROWS
    for block in range(blocks):
        begin = stretch.begin + block * (length - BLOCK_ROWS) // (blocks - 1)
        yield begin, begin + BLOCK_ROWS
