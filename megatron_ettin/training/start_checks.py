"""Checks, before a run starts, of all that it will write to and read."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from megatron_ettin.config import RunConfig
from megatron_ettin.data.orders import held_out_order
from megatron_ettin.order.ledger import format as ledger_files
from megatron_ettin.order.run_folder import STATE_FILE, RunFolder, step_of
from megatron_ettin.publication import is_unfinished


class StartError(ValueError):
    """A run could not be carried through; the message names the path and what to do."""


def check_outputs(config: RunConfig) -> None:
    """Raise StartError unless everything that the run writes can be written; leave nothing behind.

    Corpora, tokenizer, plans and the checkpoint that the run starts from are opened before its
    first step anyway.
    """
    run = RunFolder(Path(config.run_dir))
    forks = run.ledger / ledger_files.FORKS_FOLDER
    for folder in (run.path, run.ledger, forks, run.checkpoints):
        _check_folder(folder)
    names = (ledger_files.RECORDS_FILE, ledger_files.EVENTS_FILE, ledger_files.LOCK_FILE)
    in_ledger = [run.ledger / name for name in names]
    for path in (run.config, run.order, run.metrics, run.path / "profile.json", *in_ledger):
        _check_file(path)
    _check_checkpoints(run)
    if config.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise StartError(
            "logging.wandb: the package wandb is not installed: install it, or give "
            "--logging.wandb false"
        )


def check_held_out(config: RunConfig) -> None:
    """Open the corpora of `data.validation`, which are read at the end of the run at the latest.

    Raises:
        ValueError, OSError: naming the corpus.
    """
    if config.data.validation:
        held_out_order(config)


def _check_folder(folder: Path) -> None:
    """Try to create a file in a folder, or where the folder would be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise StartError(
            f"{there}: is a file, but the run needs a folder here: move it away, or give another "
            f"--run_dir"
        )
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise StartError(
            f"{there}: cannot be written to ({error.strerror}): change its permissions, or give "
            f"another --run_dir"
        ) from error


def _check_file(path: Path) -> None:
    if not path.exists():
        return
    try:
        path.open("ab").close()
    except OSError as error:
        raise StartError(
            f"{path}: cannot be written ({error.strerror}): move it away or change its "
            f"permissions, or give another --run_dir"
        ) from error


def _check_checkpoints(run: RunFolder) -> None:
    """Refuse what is in the way of a later save."""
    newest = run.newest_checkpoint()
    begin = 0 if newest is None else step_of(newest) or 0
    for path in sorted(run.checkpoints.glob("step_*")):
        step = step_of(path)
        if step is not None and step > begin:
            raise StartError(
                f"{path}: is no finished checkpoint ({STATE_FILE} is missing), but the run may "
                f"save under this name: remove it or rename it"
            )
        if is_unfinished(path) and not path.is_dir():
            raise StartError(f"{path}: is a file, but the run may save here: remove it")
