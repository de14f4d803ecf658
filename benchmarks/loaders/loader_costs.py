"""Seconds to the first batch, packed tokens a second, and memory of one loader."""

from __future__ import annotations

import itertools
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.costs import rise_of
from benchmarks.loaders.rival import PACKED_ROWS, PACKED_TOKENS, TEXT_VOCAB_SIZE, MadeUpText, Rival

MEAN_DOCUMENT_TOKENS = 750
ROUNDS = 3


def make_text(megabytes: int) -> MadeUpText:
    """Return random tokens, two bytes each, in documents as benchmarks/made_up_corpus.py draws."""
    count = megabytes * 10**6 // 2 // MEAN_DOCUMENT_TOKENS
    lengths = np.random.default_rng(1).lognormal(5.9, 1.2, count).clip(8, 200_000)
    bounds = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])
    ids = np.random.default_rng(3).integers(5, TEXT_VOCAB_SIZE, bounds[-1], dtype=np.uint16)
    return MadeUpText(ids=ids, bounds=bounds)


def write_text(rival: type[Rival], folder: Path, megabytes: int) -> dict[str, float]:
    """Write the text in the loader's format, in place of an earlier one; return what that costs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = make_text(megabytes)
    begin = time.process_time()
    rival(folder).write_text(folder / "text", text)
    seconds = time.process_time() - begin
    files_mb = _size(folder) / 1e6
    return {"text_mb": text.ids.nbytes / 1e6, "write_cpu_s": seconds, "files_mb": files_mb}


def measure_cost(load: Callable[[], type[Rival]], folder: Path) -> dict[str, float]:
    """Return what this process takes to import the loader and to read one epoch three times.

    Seconds are of processor time, of all threads: the fastest epoch counts. The first process
    after `write_text` also builds what the loader keeps beside the corpus.
    """
    begin = time.process_time()
    rival = load()(folder)
    import_s = time.process_time() - begin
    path = folder / "text"

    def first_batch() -> float:
        begin = time.process_time()
        _count(next(iter(rival.packed_batches(path))))
        return time.process_time() - begin

    def all_epochs() -> tuple[float, float, list[tuple[int, float]]]:
        first = first_batch()
        since_start = time.process_time()
        return first, since_start, [_rest_of_epoch(rival, path) for _ in range(ROUNDS)]

    (first_batch_s, since_start_s, epochs), _, rise = rise_of(all_epochs)
    return {
        "import_cpu_s": import_s,
        "first_batch_cpu_s": first_batch_s,
        "start_to_first_batch_cpu_s": since_start_s,
        "epoch_tokens": epochs[0][0],
        "tokens_per_cpu_s": max(tokens / seconds for tokens, seconds in epochs),
        "memory_mb": rise / 1e6,
        "process_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "kept_mb": _size(folder) / 1e6,
    }


def _rest_of_epoch(rival: Rival, path: Path) -> tuple[int, float]:
    """Return the tokens of an epoch less its first batch, padding left out, and its seconds."""
    batches = iter(rival.packed_batches(path))
    _count(next(batches))
    begin = time.process_time()
    tokens = sum(map(_count, itertools.islice(batches, 10_000)))
    return tokens, time.process_time() - begin


def _count(batch: Any) -> int:
    """Return the tokens of a batch, in which 0 is padding; ValueError for a wrong shape."""
    tokens = np.asarray(batch)
    if tokens.shape != (PACKED_ROWS, PACKED_TOKENS):
        raise ValueError(f"a batch of shape {tokens.shape}")
    return int(np.count_nonzero(tokens))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
