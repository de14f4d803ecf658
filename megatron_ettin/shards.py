"""Shards of a checkpoint: what Megatron-Core saves of a run, and how it is read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import maybe_load_config
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_ettin import distributed

#: Part of a message that cannot name the damaged file.
DAMAGED = "incomplete or damaged (.metadata, or a shard __*.distcp)"
#: Beginnings of the advice and guesses that torch adds to an error, which messages leave out.
ADVICE = ("In PyTorch 2.6", "This is an internal miniz error")


class ShardsError(ValueError):
    """Shards cannot be written or loaded; the message names the file or folder and the reason."""


def read_shards(
    folder: Path, stage: MegatronModule, optimizer: MegatronOptimizer | None
) -> dict[str, Any]:
    """Load the state of `model`, and of `optimizer` if it is given; all ranks call this.

    Raises:
        ShardsError: naming the file that is damaged, as far as that can be told.
    """
    _read_small_files(folder)
    wanted = sharded_state(stage, optimizer, is_loading=True)
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(folder))
    except CheckpointException as error:
        raise ShardsError(f"{folder}: {DAMAGED}: {_cause(error)}") from error
    except Exception as error:  # what damaged bytes are unpickled to can raise anything
        raise ShardsError(f"{folder}: {DAMAGED}: {describe_error(error)}") from error
    return loaded


def sharded_state(
    stage: MegatronModule, optimizer: MegatronOptimizer | None, *, is_loading: bool
) -> dict[str, Any]:
    """Return the tensors with the parts that this rank saves or loads; all ranks call this.

    The optimizer gathers moments that are sharded over data-parallel ranks.
    """
    sharding = {
        # The default type writes flattened ranges, which 0.16.1 refuses to load.
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": distributed.data_parallel_group(),
    }
    state = {"model": stage.sharded_state_dict(metadata=sharding)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            state["model"], is_loading=is_loading, metadata=sharding
        )
    return state


def _read_small_files(folder: Path) -> None:
    """Read the files that describe the shards, so that an error names the damaged one."""
    checks: dict[str, Callable[[], object]] = {
        "metadata.json": lambda: maybe_load_config(str(folder)),
        ".metadata": lambda: FileSystemReader(folder).read_metadata(),
        "common.pt": lambda: torch.load(folder / "common.pt", weights_only=True),
    }
    for name, read in checks.items():
        # 0.19 writes no common.pt; the list of files says what there was.
        if not (folder / name).exists():
            continue
        try:
            read()
        except Exception as error:  # what damaged bytes are unpickled to can raise anything
            raise ShardsError(
                f"{folder / name}: cannot be read: {describe_error(error)}"
            ) from error


def _cause(error: CheckpointException) -> str:
    """Return the message of the first rank that failed."""
    causes = [cause for cause, _ in error.failures.values()]
    return describe_error(causes[0] if causes else error)


def describe_error(error: BaseException) -> str:
    """Return an error's message without control characters and advice, cut to 300 characters."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(error))
    for advice in ADVICE:
        text = text.split(advice)[0]
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}".rstrip(": ")
