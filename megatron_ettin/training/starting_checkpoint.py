"""Choice of the checkpoint that a start goes on from: the newest one that is whole.

The places are run_dir and then `checkpoint.copy_to`. A damaged checkpoint is set aside, never
removed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

from megatron_ettin import checkpoint, distributed
from megatron_ettin.checkpoint_files import CheckpointError, describe_faults, find_faults
from megatron_ettin.config import RunConfig
from megatron_ettin.order.ledger.lock import hold_ledger
from megatron_ettin.order.run_folder import RunFolder, set_aside, step_of
from megatron_ettin.training import run_files
from megatron_ettin.training.second_place import SecondPlace, SecondPlaceError
from megatron_ettin.training.start_checks import StartError

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Candidate(NamedTuple):
    """Checkpoint that a run could go on from; compares by step, run_dir before the second place."""

    step: int
    is_local: bool


def choose_checkpoint(config: RunConfig) -> None:
    """Leave in run_dir, as its newest checkpoint, the one to resume from. All ranks call this.

    Damaged ones that are newer are set aside, and a copy is fetched if it is newer or whole.
    Nothing is changed if no checkpoint is whole.

    Raises:
        CheckpointError: there are checkpoints, but none that the run may go on from.
        StartError: the second place is another run's, or does not answer though it is needed.
        LedgerError: another process writes this run.
    """
    run = RunFolder(Path(config.run_dir))
    candidates = _agreed(partial(_candidates, config, run))
    passed_over: list[Candidate] = []
    messages: list[str] = []
    for candidate in candidates:
        faults = _faults(config, run, candidate)
        if not faults:
            newer = [run.checkpoint(step) for step, is_local in passed_over if is_local]
            _agreed(partial(_set_aside, run, newer, candidate.step))
            return
        logger.warning("damaged: %s", faults[0])
        passed_over.append(candidate)
        messages.append(describe_faults(faults))
    if messages:
        others = f" (nor is any of {len(messages) - 1} earlier ones)" if messages[1:] else ""
        raise CheckpointError(f"{messages[0]}{others}")


def _candidates(config: RunConfig, run: RunFolder) -> list[Candidate]:
    """Return what a start may go on from, best first; without `fallback` only the first.

    Raises:
        StartError: as `choose_checkpoint`.
    """
    given = config.checkpoint
    folders = run.checkpoints.glob("*") if given.falls_back else run.complete_checkpoints()
    local = {step for path in folders if path.is_dir() and (step := step_of(path)) is not None}
    copied = _copied(config, run, needed=not local) if given.copy_to is not None else []
    if not given.resume:
        return []  # `starting_state` refuses checkpoints that are there
    found = [Candidate(step, True) for step in local]
    found += [Candidate(step, False) for step in copied]
    newest_first = sorted(found, reverse=True)
    return newest_first if given.falls_back else newest_first[:1]


def _copied(config: RunConfig, run: RunFolder, *, needed: bool) -> list[int]:
    """Return the steps in the second place; a place that fails may be passed over if not `needed`.

    Raises:
        StartError: it holds another run, or one that `resume` does not ask for; or it fails.
    """
    place = SecondPlace(config.checkpoint.copy_to or "")
    own = run_files.first_record(run)
    try:
        steps, owner = place.steps(), place.owner()
    except SecondPlaceError as error:
        if needed:
            raise StartError(
                f"{error}: run_dir has no checkpoint, so this place must answer, or give no "
                f"--checkpoint.copy_to"
            ) from error
        logger.warning("%s: passed over, as run_dir has a checkpoint", error)
        return []
    if owner is not None and own is not None and owner != own:
        raise StartError(place.refusal())
    if steps and needed and not config.checkpoint.resume:
        raise StartError(
            f"{place.address}: holds checkpoints of a run already: give --checkpoint.resume true "
            f"to go on from there, or another --checkpoint.copy_to"
        )
    return steps


def _faults(config: RunConfig, run: RunFolder, candidate: Candidate) -> list[str]:
    """Compare a checkpoint with its digests, or fetch it; return its faults, alike on all ranks."""
    folder = run.checkpoint(candidate.step)
    if not candidate.is_local:
        return _agreed(partial(_fetch, config, run, candidate.step))
    if not config.checkpoint.check_files:
        return []
    return find_faults(folder) or _agreed(partial(_state_faults, folder))


def _state_faults(folder: Path) -> list[str]:
    try:
        step = checkpoint.read_state(folder).step
    except CheckpointError as error:
        return [str(error)]
    return [] if step == step_of(folder) else [f"{folder}: holds the checkpoint of step {step}"]


def _fetch(config: RunConfig, run: RunFolder, step: int) -> list[str]:
    """Fetch a checkpoint from the second place; return why that failed."""
    place = SecondPlace(config.checkpoint.copy_to or "")
    logger.info("fetching step %d from %s", step, place.address)
    with hold_ledger(run.ledger):
        try:
            place.fetch(run, step)
        except (CheckpointError, OSError) as error:
            return [str(error)]
    return []


def _set_aside(run: RunFolder, folders: Sequence[Path], step: int) -> None:
    """Rename damaged checkpoints after `step`, so that they are not in the way of later saves."""
    later = [folder for folder in folders if (step_of(folder) or 0) > step]
    if not later:
        return
    with hold_ledger(run.ledger):
        for folder in later:
            logger.warning("%s is damaged: renamed to %s", folder, set_aside(folder).name)
    logger.warning("going on from %s", run.checkpoint(step))


def _agreed(decide: Callable[[], T]) -> T:
    """Return on all ranks what the main rank decides, or raise the error that it meets."""
    outcome: tuple[T | None, Exception | None] = (None, None)
    if distributed.is_main_rank():
        try:
            outcome = decide(), None
        except (ValueError, OSError) as error:
            outcome = None, error
    value, met = distributed.broadcast(outcome)
    if met is not None:
        raise met
    return cast(T, value)
