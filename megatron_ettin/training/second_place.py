"""Second place of a run's checkpoints: a folder or an object store that outlives run_dir.

A copy of a checkpoint is whole by itself: beside the checkpoint's files there are the files of the
run as they were then, above all the ledger up to the checkpoint's record. The state file is written
last, so a copy without one was cut off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin import checkpoint
from megatron_ettin.checkpoint_files import CheckpointError
from megatron_ettin.data.storage import READ_BYTES, opened_place
from megatron_ettin.file_digests import FileDigest, FileList
from megatron_ettin.order.run_folder import STATE_FILE, RunFolder, set_aside, step_of
from megatron_ettin.publication import begin_folder, publish_folder
from megatron_ettin.training import run_files

#: Folder of the run's own files, with a folder for each checkpoint.
RUN_FILES = "run_files"
#: List of a copy's run files, with digests.
LIST_FILE = "files.json"
#: File that says whose checkpoints are here.
OWNER_FILE = "run.json"


class SecondPlaceError(OSError):
    """The second place does not do what is asked; the message names its address and the reason."""


@dataclass(frozen=True)
class SecondPlace:
    """Copies of a run's checkpoints, in a folder or behind a URL that fsspec knows."""

    address: str

    def steps(self) -> list[int]:
        """Return the steps whose copies are whole, ascending; SecondPlaceError if it fails."""
        with self._opened() as (system, root):
            parent = f"{root}/{RunFolder(Path()).checkpoints}"
            found = system.find(parent) if system.exists(parent) else []
        states = [Path(path) for path in found if path.endswith(f"/{STATE_FILE}")]
        numbers = [step_of(state.parent) for state in states]
        return sorted(number for number in numbers if number is not None)

    def owner(self) -> str | None:
        """Return the first record's chain hash of the run whose copies these are, if any."""
        with self._opened() as (system, root):
            if not system.exists(f"{root}/{OWNER_FILE}"):
                return None
            return str(json.loads(system.cat_file(f"{root}/{OWNER_FILE}"))["first_record"])

    def holds(self, folder: Path) -> bool:
        """Tell whether a whole copy of exactly this checkpoint is there."""
        with self._opened() as (system, root):
            path = f"{root}/{_place(folder)}/{STATE_FILE}"
            if not system.exists(path):
                return False
            return bool(system.cat_file(path) == (folder / STATE_FILE).read_bytes())

    def put(self, run: RunFolder, folder: Path, proceed: Callable[[], None]) -> None:
        """Copy a published checkpoint, read the copy back, and compare it with the digests.

        An undone checkpoint of the same step goes first. `proceed` is called before each file; an
        error that it raises ends the copy.

        Raises:
            CheckpointError: the checkpoint is not of the run's ledger, or the place is another
                run's.
            OSError: a file cannot be copied, or comes back with other bytes.
        """
        state = (folder / STATE_FILE).read_bytes()
        listed = FileList.from_document(json.loads(state))
        contents = run_files.take(run, folder)
        beside = FileList({name: FileDigest.of_content(c) for name, c in contents.items()})
        contents[LIST_FILE] = json.dumps(beside.to_document(), indent=2).encode()
        self._claim(run)
        with self._opened() as (system, root):
            copy, own = f"{root}/{_place(folder)}", f"{root}/{RUN_FILES}/{folder.name}"
            _remove(system, f"{copy}/{STATE_FILE}", copy, own)
            expected = {}
            for name, digest in listed.files.items():
                proceed()
                _make_parent(system, f"{copy}/{name}")
                system.put_file(str(folder / name), f"{copy}/{name}")
                expected[f"{copy}/{name}"] = digest
            for name, content in contents.items():
                proceed()
                _make_parent(system, f"{own}/{name}")
                system.pipe_file(f"{own}/{name}", content)
                expected[f"{own}/{name}"] = FileDigest.of_content(content)
            for path, digest in expected.items():
                proceed()
                _require_equal(path, _digest(system, path), digest)
            system.pipe_file(f"{copy}/{STATE_FILE}", state)

    def fetch(self, run: RunFolder, step: int) -> None:
        """Copy a checkpoint back to `run`, which nobody else may change meanwhile.

        Files of the run come with it, unless its ledger has the checkpoint's record already.
        Everything is compared with its digest, and the checkpoint appears last. A damaged one in
        its place is set aside.

        Raises:
            CheckpointError: the copy is damaged, or not of the ledger that `run` has.
            OSError: the place does not return a file.
        """
        folder = run.checkpoint(step)
        with self._opened() as (system, root):
            copy, own = f"{root}/{_place(folder)}", f"{root}/{RUN_FILES}/{folder.name}"
            unfinished = begin_folder(folder)
            content = system.cat_file(f"{copy}/{STATE_FILE}")
            (unfinished / STATE_FILE).write_bytes(content)
            try:
                head = checkpoint.read_state(unfinished).ledger_head
            except CheckpointError as error:
                raise CheckpointError(f"{copy}: damaged: {error}") from error
            if head is None or not run_files.holds(run, head):
                beside = _read_list(own, system.cat_file(f"{own}/{LIST_FILE}"))
                contents = {name: system.cat_file(f"{own}/{name}") for name in beside.files}
                for name, digest in beside.files.items():
                    _require_equal(f"{own}/{name}", FileDigest.of_content(contents[name]), digest)
                run_files.put(run, contents)
            for name, digest in _read_list(copy, content).files.items():
                system.get_file(f"{copy}/{name}", str(unfinished / name))
                _require_equal(f"{copy}/{name}", FileDigest.of_file(unfinished / name), digest)
        if folder.exists():
            set_aside(folder)
        publish_folder(folder)

    def _claim(self, run: RunFolder) -> None:
        """Write whose copies these are; CheckpointError if they are another run's."""
        owner, first = self.owner(), run_files.first_record(run)
        if owner is None:
            with self._opened() as (system, root):
                _make_parent(system, f"{root}/{OWNER_FILE}")
                content = json.dumps({"first_record": first}) + "\n"
                system.pipe_file(f"{root}/{OWNER_FILE}", content.encode())
        elif owner != first:
            raise CheckpointError(self.refusal())

    def refusal(self) -> str:
        """Return the message about a place that another run has taken."""
        return (
            f"{self.address}: holds checkpoints of another run: give another --checkpoint.copy_to"
        )

    def _opened(self) -> AbstractContextManager[tuple[Any, str]]:
        return opened_place(self.address, SecondPlaceError, CheckpointError)


def _place(folder: Path) -> str:
    """Return the place of a checkpoint's copy."""
    return (RunFolder(Path()).checkpoints / folder.name).as_posix()


def _read_list(folder: str, content: bytes) -> FileList:
    """Return the list of files in a JSON file of a copy; CheckpointError if it is damaged."""
    try:
        return FileList.from_document(json.loads(content))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: its list of files is damaged: {error}") from error


def _remove(system: Any, *paths: str) -> None:
    for path in paths:
        if system.exists(path):
            system.rm(path, recursive=True)
            system.invalidate_cache()


def _make_parent(system: Any, path: str) -> None:
    system.makedirs(path.rpartition("/")[0], exist_ok=True)


def _digest(system: Any, path: str) -> FileDigest:
    """Read a file of the place and return its digest."""
    sha256, num_bytes = hashlib.sha256(), 0
    with system.open(path, "rb") as file:
        while part := file.read(READ_BYTES):
            sha256.update(part)
            num_bytes += len(part)
    return FileDigest(num_bytes, sha256.hexdigest())


def _require_equal(path: str, found: FileDigest, expected: FileDigest) -> None:
    if found != expected:
        raise CheckpointError(
            f"{path}: has {found.num_bytes} bytes of SHA-256 {found.sha256}, but "
            f"{expected.num_bytes} of {expected.sha256} were copied"
        )
