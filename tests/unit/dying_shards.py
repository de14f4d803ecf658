"""Shards whose process dies the first time, for tests of what waits for it."""

import os
import signal
import time
from pathlib import Path

from megatron_ettin.data.preprocess import preprocess_shard
from megatron_ettin.data.preprocess_options import PreprocessOptions

DIES_BEFORE, DIES_AFTER, IS_REFUSED = 1, 2, 1


def die_before(options: PreprocessOptions, index: int) -> None:
    """Make a shard; shard DIES_BEFORE kills its process first, once."""
    if index == DIES_BEFORE:
        _die_once(options)
    preprocess_shard(options, index)


def die_after(options: PreprocessOptions, index: int) -> None:
    """Make a shard; shard DIES_AFTER kills its process when it is there, once."""
    preprocess_shard(options, index)
    if index == DIES_AFTER:
        _die_once(options)


def refuse(options: PreprocessOptions, index: int) -> None:
    """Make a shard; refuse shard IS_REFUSED."""
    if index == IS_REFUSED:
        raise ValueError("c.jsonl:17: invalid UTF-8")
    preprocess_shard(options, index)


def _die_once(options: PreprocessOptions) -> None:
    mark = Path(f"{options.output_prefix.parent}.killed")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def sleep(mark: Path) -> None:
    """Write this process's number, and sleep for a minute."""
    mark.write_text(str(os.getpid()))
    time.sleep(60)


def note_threads(path: Path) -> None:
    """Write the number of threads that gigatoken would take."""
    path.write_text(os.environ["RAYON_NUM_THREADS"])
