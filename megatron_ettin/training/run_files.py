"""The files of a run at one of its checkpoints: taken for a copy, and put into an empty folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_ettin import checkpoint
from megatron_ettin.checkpoint_files import CheckpointError
from megatron_ettin.order.ledger import RECORD, Head, Kind
from megatron_ettin.order.ledger.format import EVENTS_FILE, FORKS_FOLDER, RECORD_BYTES, RECORDS_FILE
from megatron_ettin.order.row_losses import LOSSES_SUFFIX
from megatron_ettin.order.run_folder import CONFIG_FILE, RunFolder
from megatron_ettin.publication import publish_bytes

#: A record ends with its chain.
_CHAIN_BYTES = RECORD["chain"].itemsize


def first_record(run: RunFolder) -> str | None:
    """Return the chain hash of the ledger's first record, hexadecimal; None if there is none."""
    if not (run.ledger / RECORDS_FILE).is_file():
        return None
    with (run.ledger / RECORDS_FILE).open("rb") as records:
        return records.read(RECORD_BYTES)[-_CHAIN_BYTES:].hex() or None


def holds(run: RunFolder, head: Head) -> bool:
    """Tell whether the ledger of `run` has the record `head`; what is before it is not verified."""
    path = run.ledger / RECORDS_FILE
    if not path.is_file():
        return False
    with path.open("rb") as records:
        records.seek((head.seq + 1) * RECORD_BYTES - _CHAIN_BYTES)
        return records.read(_CHAIN_BYTES).hex() == head.chain


def take(run: RunFolder, folder: Path) -> dict[str, bytes]:
    """Return the content of the run's files at a checkpoint, by path in the run's folder.

    The ledger and metrics.jsonl go up to the checkpoint. The writer of the ledger may go on.

    Raises:
        CheckpointError: the checkpoint is not of this ledger.
    """
    state = checkpoint.read_state(folder)
    head = Head(state.ledger_seq, state.ledger_chain)
    if not holds(run, head):
        raise CheckpointError(f"{folder}: is not of the ledger in {run.ledger}")
    with (run.ledger / RECORDS_FILE).open("rb") as file:
        records = file.read((head.seq + 1) * RECORD_BYTES)
    num_lines = int((np.frombuffer(records, RECORD)["kind"] != Kind.STEP).sum())
    lines = (run.ledger / EVENTS_FILE).read_bytes().splitlines(keepends=True)[:num_lines]
    metrics = [line for line in run.metrics_lines() if json.loads(line)["step"] <= state.step]
    ledger = run.ledger.relative_to(run.path)
    contents = {
        f"{ledger}/{EVENTS_FILE}": b"".join(lines),
        f"{ledger}/{RECORDS_FILE}": records,
        run.config.name: (folder / CONFIG_FILE).read_bytes(),
        run.order.name: run.order.read_bytes(),
        run.metrics.name: "".join(line + "\n" for line in metrics).encode(),
    }
    if run.wandb_id.is_file():
        contents[run.wandb_id.name] = run.wandb_id.read_bytes()
    for fork in sorted((run.ledger / FORKS_FOLDER).glob("fork_*")):
        if fork.suffix == LOSSES_SUFFIX:  # may be large; no losses are copied
            continue
        contents[f"{ledger}/{FORKS_FOLDER}/{fork.name}"] = fork.read_bytes()
    return contents


def put(run: RunFolder, contents: Mapping[str, bytes]) -> None:
    """Write what `take` returned into the folder of a run whose ledger is none or an earlier one.

    Nothing is written if the folder's ledger has other records.

    Raises:
        CheckpointError: the folder's ledger is not a beginning of the given one.
    """
    path = run.ledger / RECORDS_FILE
    there = path.read_bytes() if path.is_file() else b""
    whole = there[: len(there) // RECORD_BYTES * RECORD_BYTES]
    if not contents[str(path.relative_to(run.path))].startswith(whole):
        raise CheckpointError(
            f"{run.ledger}: has records that are not those of the copied checkpoint: move it away "
            f"to go on from the copy"
        )
    # Forks first and records last: a start that is ended on the way finds an earlier ledger.
    for name in sorted(
        contents, key=lambda name: (name.endswith(RECORDS_FILE), FORKS_FOLDER not in name)
    ):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        publish_bytes(run.path / name, contents[name])
