"""Checks before a run starts: of all that it will write, read and resume from."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ettin import checkpoint
from megatron_ettin.checkpoint import RunState
from megatron_ettin.checkpoint_files import CheckpointError
from megatron_ettin.config import RunConfig
from megatron_ettin.data.orders import open_held_out_order
from megatron_ettin.order import OrderSpec
from megatron_ettin.order.ledger import format as ledger_files
from megatron_ettin.order.run_folder import CONFIG_FILE, STATE_FILE, RunFolder, step_of
from megatron_ettin.order.spec import find_first_difference
from megatron_ettin.publication import is_unfinished


class StartError(ValueError):
    """A run would fail later; the message names the path and the remedy."""


def check_outputs(config: RunConfig) -> None:
    """Raise StartError unless everything that the run writes can be written; leave nothing behind.

    Inputs need no check here: corpora, tokenizer, plans and the starting checkpoint are opened
    before the first step anyway.
    """
    run = RunFolder(Path(config.run_dir))
    forks = run.ledger / ledger_files.FORKS_FOLDER
    for folder in (run.path, run.ledger, forks, run.checkpoints):
        _check_folder(folder)
    names = (ledger_files.RECORDS_FILE, ledger_files.EVENTS_FILE, ledger_files.LOCK_FILE)
    in_ledger = [run.ledger / name for name in names]
    in_ledger += [run.row_losses] if config.logging.row_losses else []
    for path in (run.config, run.order, run.metrics, run.path / "profile.json", *in_ledger):
        _check_file(path)
    _check_checkpoints(run, sets_aside=config.checkpoint.falls_back)
    for package in ("wandb", "tensorboard"):
        if getattr(config.logging, package) and importlib.util.find_spec(package) is None:
            raise StartError(
                f"logging.{package}: the package {package} is not installed: install it, or give "
                f"--logging.{package} false"
            )


def check_held_out(config: RunConfig) -> None:
    """Open the corpora of `data.validation` now: the run may read them only at its end.

    Raises:
        ValueError, OSError: naming the corpus.
    """
    if config.data.validation:
        open_held_out_order(config)


def check_same_run(config: RunConfig, folder: Path) -> None:
    """Raise CheckpointError if the checkpoint `folder` is of a run with another computation."""
    saved = checkpoint.read_config(folder)
    differing = [
        name
        for name in ("objective", "model", "seeds")
        if getattr(saved, name) != getattr(config, name)
    ]
    if saved.optimizer.name != config.optimizer.name:
        differing.append("optimizer.name")
    if differing:
        raise CheckpointError(
            f"{folder}: was trained with another {' and '.join(differing)}: resume with the same, "
            f"or start a new run_dir with --checkpoint.initialize_from"
        )


def check_same_order(config: RunConfig, spec: OrderSpec, folder: Path, state: RunState) -> None:
    """Raise CheckpointError if the past differs, or the future without `amend_order`.

    `state` is that of the checkpoint `folder`, `spec` the order that `config` describes; the run's
    order.json must agree with both.
    """
    begun = sum(phase.start_g < state.g for phase in spec.phases)
    if tuple(spec.phase_ids()[:begun]) != state.phase_ids[:begun] or state.g > spec.num_rows:
        raise CheckpointError(
            f"{folder}: was trained in another sample order: its phases up to {state.phase!r} "
            f"differ from this configuration's in data, blend, pools, seq_length, pack, "
            f"train_tokens, seed or tokenizer{_first_difference(config, spec)}; change only rows "
            f"from {state.g} on"
        )
    if plans_other_rows(spec, state) and not config.checkpoint.amend_order:
        raise CheckpointError(
            f"{folder}: had planned other rows from row {state.g} on"
            f"{_first_difference(config, spec)}; give "
            f"--checkpoint.amend_order true to go on with this configuration's, which the ledger "
            f"then records, or restore the phases in {folder / CONFIG_FILE}"
        )
    _check_order_file(config, spec, folder)


def _first_difference(config: RunConfig, spec: OrderSpec) -> str:
    """Return in what order.json differs first from `spec`, in brackets; "" if it cannot tell."""
    path = RunFolder(Path(config.run_dir)).order
    try:
        recorded, now = json.loads(path.read_text()), json.loads(spec.to_json())
        for ids in ("order_id", "phase_ids"):  # they follow from the rest
            del recorded[ids], now[ids]
        changed = _changed_files(config, recorded, now)
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    difference = find_first_difference(recorded, now)
    return "" if difference is None else f" ({changed}{path}: {difference})"


def _changed_files(config: RunConfig, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the corpora's files that are others than in the recorded order; "" if none is.

    Corpora of several shards name theirs when they are opened.
    """
    was, today = _content(recorded), _content(now)
    changed = [
        f"{config.data.sources[source].prefix}.{end}"
        for (source, end), sha256 in today.items()
        if source in config.data.sources and was.get((source, end), sha256) != sha256
    ]
    return f"{' and '.join(changed)} changed since the run began; " if changed else ""


def _content(order: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return the SHA-256 of each source's files, by source and end of the name."""
    ends = {"bin": "tokens_sha256", "idx": "lengths_sha256"}
    return {
        (pool["source"], end): pool[name]
        for phase in order["phases"]
        for pool in phase["pools"]
        for end, name in ends.items()
    }


def _check_order_file(config: RunConfig, spec: OrderSpec, folder: Path) -> None:
    """Raise CheckpointError if order.json says something else, unless `amend_order` allows it.

    It agrees with the checkpoint unless it was altered, or amended after the save.
    """
    path = RunFolder(Path(config.run_dir)).order
    if not path.is_file() or config.checkpoint.amend_order:
        return
    try:
        recorded = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: no JSON ({error}); restore it, or remove it") from error
    difference = find_first_difference(recorded, json.loads(spec.to_json()))
    if difference is not None:
        raise CheckpointError(
            f"{path}: is not the order that {folder} and this configuration have: {difference}. "
            f"Restore it if it was altered; if the run was amended after that checkpoint, give "
            f"--checkpoint.amend_order true to write this configuration's in its place"
        )


def plans_other_rows(spec: OrderSpec, state: RunState) -> bool:
    """Tell whether an order has other rows than the run of a checkpoint had planned."""
    planned = state.phase_ids, state.phase_ends
    return planned != (tuple(spec.phase_ids()), tuple(spec.phase_ends()))


def _check_folder(folder: Path) -> None:
    """Try to create a file in a folder, or in the nearest parent that exists."""
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


def _check_checkpoints(run: RunFolder, *, sets_aside: bool) -> None:
    """Refuse files and folders that are in the way of a later save.

    Folders are not, where the start sets aside what is no finished checkpoint.
    """
    newest = run.newest_checkpoint()
    begin = 0 if newest is None else step_of(newest) or 0
    for path in sorted(run.checkpoints.glob("step_*")):
        step = step_of(path)
        if step is not None and step > begin and not (sets_aside and path.is_dir()):
            raise StartError(
                f"{path}: is no finished checkpoint ({STATE_FILE} is missing), but the run may "
                f"save under this name: remove it or rename it"
            )
        if is_unfinished(path) and not path.is_dir():
            raise StartError(f"{path}: is a file, but the run may save here: remove it")
