"""Checks that a checkpoint's files are those that were saved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ettin import distributed
from megatron_ettin.file_digests import FileList, differences, unlisted
from megatron_ettin.order.run_folder import CONFIG_FILE, STATE_FILE
from megatron_ettin.shards import describe_error

#: Description of the weights in a checkpoint.
MODEL_FILE = "model.json"
#: Remedy for a damaged checkpoint.
REMEDY = "copy the checkpoint again, or use another one"
#: Remedy for a checkpoint whose files differ from the list in its state, if it is loaded anyway.
SKIP_CHECK = "give --checkpoint.check_files false (tools/convert.py: --no-check-files)"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the folder and the reason."""


def check_files(folder: Path) -> FileList:
    """Compare every file of a checkpoint with the digests in its state; return the list of files.

    Under torchrun all ranks call this: those of a machine share the files, and all ranks raise if
    one finds a difference.

    Raises:
        CheckpointError: no checkpoint, one without digests, or other files than were saved.
    """
    if faults := find_faults(folder):
        raise CheckpointError(describe_faults(faults))
    return read_files(folder)


def find_faults(folder: Path) -> list[str]:
    """Compare every file of a checkpoint as `check_files` does; return a line for each difference.

    All ranks call this and get the same lines, also if only one of them sees a fault.
    """
    faults = []
    place, size = distributed.local_rank()
    try:
        listed = read_files(folder)
        # The files in order of size are dealt out to the ranks of a machine, so that each hashes
        # about as many bytes.
        by_size = sorted(listed.files, key=lambda name: -listed.files[name].num_bytes)
        faults = differences(folder, listed, by_size[place::size])
        if place == 0:
            faults += unlisted(folder, listed, beside=[STATE_FILE])
    except (CheckpointError, OSError) as error:
        faults.append(str(error))
    every = [fault for part in distributed.all_gather(faults) for fault in part]
    return list(dict.fromkeys(every))


def describe_faults(faults: Sequence[str]) -> str:
    """Return the message about a checkpoint with one fault or more: the first, and the remedy."""
    if SKIP_CHECK in faults[0] or REMEDY in faults[0]:
        return faults[0]
    more = f" (and {len(faults) - 1} more such files)" if len(faults) > 1 else ""
    return (
        f"{faults[0]}{more}. The checkpoint is not as it was saved: {REMEDY}; {SKIP_CHECK} to "
        f"load it as it is"
    )


def read_files(folder: Path) -> FileList:
    """Return the list of files with digests that the state in `folder` holds.

    Raises:
        CheckpointError: no checkpoint, or one without digests.
    """
    if not (folder / STATE_FILE).is_file():
        raise CheckpointError(f"{folder}: no checkpoint here ({STATE_FILE} is missing)")
    document = read_json(folder / STATE_FILE)
    try:
        return FileList.from_document(document)
    except ValueError as error:
        since = "" if "files_sha256" in document else " (it was saved by an earlier version)"
        raise CheckpointError(
            f"{folder / STATE_FILE}: {error}{since}: {SKIP_CHECK} to load it unchecked"
        ) from error


def check_sizes(folder: Path) -> None:
    """Raise CheckpointError if a file is missing or cut; always done, as it only looks at sizes.

    What people may have edited, and then load without `check_files`, is left out.
    """
    try:
        sizes = {
            # Earlier versions listed the sizes alone.
            name: int(written["bytes"] if isinstance(written, dict) else written)
            for name, written in read_json(folder / STATE_FILE)["files"].items()
            if name not in (CONFIG_FILE, MODEL_FILE)
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / STATE_FILE}: its list of files is damaged: {describe_error(error)}; "
            f"{REMEDY}"
        ) from error
    for name, size in sizes.items():
        if not name.isprintable() or "/" in name:
            raise CheckpointError(
                f"{folder / STATE_FILE}: its list of files is damaged: {name!r} is no file's name; "
                f"{REMEDY}"
            )
        path = folder / name
        num_bytes = path.stat().st_size if path.is_file() else None
        if num_bytes != size:
            state = "missing" if num_bytes is None else f"of {num_bytes} bytes"
            raise CheckpointError(f"{path}: is {state}, but {size} bytes were written; {REMEDY}")


def describe_damage(folder: Path) -> str:
    """Return the damaged files after a load has failed, if the state has their digests."""
    try:
        listed = read_files(folder)
    except CheckpointError:
        return ""
    return "".join(f"; {fault}" for fault in differences(folder, listed, listed.files))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file of a checkpoint holds.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable: {describe_error(error)}; {REMEDY}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: unreadable: it holds no JSON object; {REMEDY}")
    return document
