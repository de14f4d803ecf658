"""Keeper of a run's checkpoints: copies them to the second place and removes those of no use.

The main rank decides at each publication; a thread copies and deletes beside the training.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_ettin import checkpoint, distributed
from megatron_ettin.checkpoint_files import CheckpointError
from megatron_ettin.config import KeepConfig, RunConfig
from megatron_ettin.order.run_folder import REMOVED, RunFolder, step_of
from megatron_ettin.publication import remove_unfinished_folders, withdraw_folder
from megatron_ettin.training.metrics import Reporter
from megatron_ettin.training.second_place import SecondPlace, SecondPlaceError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KeptCheckpoint:
    """Complete checkpoint, with what decides whether it stays."""

    folder: Path
    step: int
    tokens: int
    """Tokens consumed by the run."""
    ends_phase: bool


def read_checkpoints(run: RunFolder) -> list[KeptCheckpoint]:
    """Read the states of all complete checkpoints, in the order of steps, without damaged ones."""
    found = []
    for folder in run.complete_checkpoints():
        step = step_of(folder)
        if step is None:
            continue
        try:
            state = checkpoint.read_state(folder)
        except CheckpointError as error:
            if folder.is_dir():  # the other thread may have removed it since
                logger.warning("%s: it is neither copied nor removed", error)
            continue
        found.append(
            KeptCheckpoint(
                folder=folder,
                step=step,
                tokens=state.consumed_tokens,
                ends_phase=state.g in state.phase_ends,
            )
        )
    return sorted(found, key=lambda entry: entry.step)


def removable(checkpoints: Sequence[KeptCheckpoint], keep: KeepConfig) -> list[KeptCheckpoint]:
    """Return those of all checkpoints, which are in the order of steps, that need not stay."""
    if keep.keeps_all:
        return []
    staying = {entry.step for entry in checkpoints if entry.ends_phase}
    staying |= {entry.step for entry in checkpoints[-(keep.last or 1) :]}
    if keep.every_tokens is not None:
        # Since the first of each multiple stays, it is still the first when this is asked again.
        every = keep.every_tokens
        for multiple, group in itertools.groupby(checkpoints, lambda entry: entry.tokens // every):
            if multiple:
                staying.add(next(group).step)
    return [entry for entry in checkpoints if entry.step not in staying]


def open_keeper(config: RunConfig, reporter: Reporter) -> Keeper:
    """Return the keeper of a run whose ledger this process has locked.

    Folders that killed processes left half-written or half-removed go.
    """
    run = RunFolder(Path(config.run_dir))
    if distributed.is_main_rank():
        remove_unfinished_folders(run.checkpoints)
    address = config.checkpoint.copy_to
    place = None if address is None else SecondPlace(address)
    keeper = Keeper(run, config.checkpoint.keep, place, reporter.write_durably)
    keeper.copy_missing()
    return keeper


class Keeper:
    """Copies checkpoints and removes them; does nothing but on the main rank."""

    def __init__(
        self,
        run: RunFolder,
        keep: KeepConfig,
        place: SecondPlace | None,
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        """Take the run's folder and the rule; begin nothing.

        `report` writes a line of metrics.jsonl durably; OSError if the disk refuses.
        """
        self._run, self._keep, self._place = run, keep, place
        self._report = report
        self._is_main = distributed.is_main_rank()
        self._copied: set[int] = set()
        self._gives_up = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="keeper")

    def __enter__(self) -> Keeper:
        """Return the keeper; the block's end waits for its work."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish copying and removing; after an error, give it up: the next start does it."""
        if kind is not None:
            self._gives_up.set()
        elif copying := self.copy_missing():
            logger.info("waiting for the copies in %s", self._place and self._place.address)
            wait([copying])
            self._remove()
        self._thread.shutdown(wait=True)

    def note_published(self) -> None:
        """Copy a new checkpoint in the background, and remove those that it makes superfluous."""
        if self._is_main:
            self.copy_missing()
            self._remove()

    def copy_missing(self) -> Future[None] | None:
        """Begin to copy the checkpoints that the second place lacks, if there is one."""
        if not self._is_main or self._place is None:
            return None
        return self._thread.submit(self._copy, self._place)

    def _copy(self, place: SecondPlace) -> None:
        """Copy what is missing, the newest first; an error is logged, and ends no run."""
        for entry in reversed(read_checkpoints(self._run)):
            if entry.step in self._copied or self._gives_up.is_set():
                continue
            try:
                if not place.holds(entry.folder):
                    place.put(self._run, entry.folder, self._refuse_after_giving_up)
                    logger.info("copied %s to %s", entry.folder, place.address)
                self._copied.add(entry.step)
            except Exception as error:  # no error of a store may end the training
                if not self._gives_up.is_set():
                    logger.error("%s; tried again after the next checkpoint", error)

    def _refuse_after_giving_up(self) -> None:
        if self._gives_up.is_set():
            raise SecondPlaceError("the run has failed")

    def _remove(self) -> None:
        """Rename what need not stay and delete it in the background."""
        checkpoints = read_checkpoints(self._run) if not self._keep.keeps_all else []
        unneeded = removable(checkpoints, self._keep)
        if self._place is not None:
            done = self._copied.copy()
            newest = max(done, default=0)
            unneeded = [entry for entry in unneeded if entry.step in done and entry.step < newest]
        for entry in unneeded:
            try:
                # The line first: a checkpoint that is gone without one counts as lost.
                name = entry.folder.name
                # A run that goes back to before the step drops the line.
                self._report({"kind": REMOVED, "step": entry.step, "checkpoint": name})
                withdrawn = withdraw_folder(entry.folder)
            except OSError as error:
                logger.error("%s stays: %s", entry.folder, error)
                return
            logger.info("removing %s (checkpoint.keep)", entry.folder)
            self._thread.submit(_delete, withdrawn)


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.error("%s: cannot be removed: %s; the next start tries again", folder, error)
