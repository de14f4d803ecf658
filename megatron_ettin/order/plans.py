"""Row plans on disk: named by a hash of all their inputs, and built by the first process that asks.

A plan lists the documents of each row of a pool. Its key hashes everything that the packing depends
on and nothing else: no path, no time stamp, no training length. So a plan never becomes stale.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

from tqdm import tqdm

from megatron_ettin import native
from megatron_ettin.config.data import Packing
from megatron_ettin.file_lock import open_locked
from megatron_ettin.rows import Specials

FORMAT = "plan/1"


@dataclass(frozen=True, kw_only=True)
class PlanKey:
    """All inputs of the packing, which decide the documents of each row."""

    lengths_sha256: str
    first_document: int
    end_document: int
    seq_length: int
    pack: Packing
    specials: Specials
    min_doc_tokens: int
    max_segments_per_row: int

    @property
    def name(self) -> str:
        """File name without suffix: 32 hexadecimal digits."""
        # Sorted, so that the order of the fields above does not rename every plan on disk.
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def plan_path(key: PlanKey, folder: Path, kind: Literal["stored", "recomputed"]) -> Path:
    """Return the file of a plan."""
    return folder / f"{key.name}{'.plan' if _has_bodies(kind) else '.table'}"


def _has_bodies(kind: Literal["stored", "recomputed"]) -> bool:
    """Tell whether a plan's file says which pieces make up each row."""
    match kind:
        case "stored":
            return True
        case "recomputed":
            return False
        case _:
            assert_never(kind)


def open_plan(
    corpus: native.TokenCorpus, key: PlanKey, folder: Path, kind: Literal["stored", "recomputed"]
) -> native.RowPlan:
    """Open the plan with this key; build it first if there is none.

    If several processes ask, one builds and the others wait. That only saves work: every process
    would write the same bytes. A plan appears under its name when it is complete, and is never
    replaced.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: the file is damaged; the message names the byte.
    """
    path = plan_path(key, folder, kind)
    if not path.exists():
        with _one_builder(folder):
            if not path.exists():
                _build(corpus, key, path, bodies=_has_bodies(kind))
    return native.RowPlan(path, corpus)


def _build(corpus: native.TokenCorpus, key: PlanKey, path: Path, *, bodies: bool) -> None:
    rules = dataclasses.asdict(key)
    del rules["lengths_sha256"]
    total = key.end_document - key.first_document
    with tqdm(total=total, desc="packing", unit="doc", unit_scale=True, disable=None) as bar:
        native.build_row_plan(
            corpus, path, **rules, bodies=bodies, progress=lambda done: bar.update(done - bar.n)
        )


@contextmanager
def _one_builder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the kernel releases however the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = open_locked(folder / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise OSError(
            error.errno,
            f"plans cannot be written here ({error.strerror}); name another folder with "
            f"data.plan_dir",
            str(folder),
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)
