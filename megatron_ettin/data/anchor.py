"""Anchor: heads of a run's ledger, kept at a place whose files the run cannot change.

Every head is a file of its own, because an object store cannot append. No file is written twice.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ettin.data.storage import opened_place
from megatron_ettin.order.ledger import Head

FORMAT = "megatron-ettin-anchor/1"
_PREFIX, _SUFFIX = "head_", ".json"


class AnchorError(OSError):
    """The anchor does not do what is asked; the message names its address and the reason."""


class AnchoredHead(NamedTuple):
    """A head as the anchor holds it."""

    name: str
    """Name of its file."""
    unix_ns: int
    """Time of writing by the clock of the run."""
    head: Head
    first_record: str
    """Chain hash of the first record of the run's ledger."""


@dataclass(frozen=True)
class Anchor:
    """Heads of one run, in a folder or behind a URL that fsspec knows."""

    address: str

    def add(self, head: Head, first_record: str) -> None:
        """Write a head to a new file, durably.

        Raises:
            AnchorError: the place refuses, or does not answer.
        """
        unix_ns = time.time_ns()
        # Names are in the order of writing, also where the run goes back to an earlier record.
        name = f"{_PREFIX}{unix_ns:020d}_{head.seq}{_SUFFIX}"
        content = {"format": FORMAT, "unix_ns": unix_ns, **head._asdict()}
        line = json.dumps({**content, "first_record": first_record}) + "\n"
        with opened_place(self.address, AnchorError) as (system, root):
            if "file" in system.protocol:
                _write_new(Path(root) / name, line.encode())
            else:
                system.pipe_file(f"{root}/{name}", line.encode(), mode="create")

    def heads(self) -> tuple[list[AnchoredHead], list[str]]:
        """Return all heads in the order of writing, and the names of files that hold no head.

        A process that was killed while it wrote leaves a file without one.

        Raises:
            AnchorError: the place does not answer.
        """
        heads, others = [], []
        with opened_place(self.address, AnchorError) as (system, root):
            paths = [f"{root}/{name}" for name in _names(system, root)]
            # All at once, as a store takes tens of milliseconds for each.
            contents = system.cat(paths) if paths else {}
            for path in sorted(contents):
                name = path.rpartition("/")[2]
                try:
                    heads.append(_parse(name, contents[path]))
                except (ValueError, KeyError, TypeError):
                    others.append(name)
        return heads, others

    def owner(self) -> str | None:
        """Return the first record's chain hash of the run whose heads these are, if any.

        Raises:
            AnchorError: the place does not answer.
        """
        with opened_place(self.address, AnchorError) as (system, root):
            for name in _names(system, root):
                try:
                    return _parse(name, system.cat_file(f"{root}/{name}")).first_record
                except (ValueError, KeyError, TypeError):
                    continue
        return None


def _names(system: Any, root: str) -> list[str]:
    found = system.ls(root, detail=False) if system.exists(root) else []
    names = (path.rstrip("/").rpartition("/")[2] for path in found)
    return sorted(name for name in names if name.startswith(_PREFIX) and name.endswith(_SUFFIX))


def _parse(name: str, content: bytes) -> AnchoredHead:
    """Return the head in a file; ValueError, KeyError or TypeError if there is none."""
    said = json.loads(content)
    if said["format"] != FORMAT:
        raise ValueError(f"{name}: its format is {said['format']}, this program reads {FORMAT}")
    head = Head(int(said["seq"]), str(said["chain"]))
    return AnchoredHead(name, int(said["unix_ns"]), head, str(said["first_record"]))


def _write_new(path: Path, content: bytes) -> None:
    """Write a file that must not exist; there is no rename, which append-only folders refuse."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
