"""Documents of a probe that a run was trained on, by the SHA-256 of their texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.data.sharded_provenance import find_digests
from megatron_ettin.queries.documents import Sidecars
from megatron_ettin.queries.recorded_run import RecordedRun, open_run


class TrainedOn(NamedTuple):
    """Answer for one run."""

    is_seen: NDArray[np.bool_]
    """[n], True where the run was trained on a copy of the text."""
    unknown: list[str]
    """Sources whose documents cannot be told, because a sidecar is missing."""


def trained_on(folder: Path, texts: Sequence[str]) -> TrainedOn:
    """Tell which texts a run was trained on, up to its last recorded step; copies count.

    Raises:
        ValueError, OSError: the run or its corpora cannot be read, or do not match.
    """
    run = open_run(folder)
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    sidecars, seen = Sidecars(run), set[bytes]()
    unknown = []
    for source in run.order.source_names:
        provenance = sidecars.provenance(source)
        if provenance is None:
            unknown.append(source)
            continue
        found = find_digests(provenance, set(digests))
        hashes = provenance.documents(found, ["sha256"])["sha256"].to_pylist()
        for ordinal, digest in zip(found.tolist(), hashes, strict=True):
            if digest not in seen and _was_seen(run, source, ordinal):
                seen.add(digest)
    return TrainedOn(np.array([digest in seen for digest in digests], dtype=np.bool_), unknown)


def _was_seen(run: RecordedRun, source: str, ordinal: int) -> bool:
    rows = run.order.where(source, ordinal)
    past = rows[rows < run.end_g]
    return bool(len(past)) and bool(run.steps_of_rows(past).any())
