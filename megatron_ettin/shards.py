"""A checkpoint's shards: Megatron-Core's `torch_dist` format, hashed while it is written.

Megatron-Core's own writer forks a process for each file and keeps a manager process for their
results. Those outlive a rank that fails and hold its output open. Torch's writer of the same format
needs no process.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import maybe_load_config
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_ettin import distributed
from megatron_ettin.file_digests import FileDigest

#: Part of a message that cannot name the damaged file.
DAMAGED = "incomplete or damaged (.metadata, or a shard __*.distcp)"
#: Beginnings of the advice and guesses that torch adds to an error, which messages leave out.
ADVICE = ("In PyTorch 2.6", "This is an internal miniz error")
#: Pieces of at least this size are hashed while they are written; a tensor is one piece.
PARALLEL_BYTES = 1 << 20


class ShardsError(ValueError):
    """Shards cannot be written or loaded; the message names the file or folder and the reason."""


def write_shards(
    folder: Path, stage: MegatronModule, optimizer: MegatronOptimizer | None
) -> dict[str, FileDigest]:
    """Write to `folder`, which exists; all ranks call this. Return digests of this rank's files.

    Rank 0 also writes what all ranks share; small files of Megatron-Core's may not be among the
    digests.

    Raises:
        ShardsError: a rank could not write, naming the reason.
    """
    files = HashingFiles()
    save_to(folder, stage, optimizer, files)
    return files.digests


def save_to(
    folder: Path, stage: MegatronModule, optimizer: MegatronOptimizer | None, files: FileSystem
) -> None:
    """Write to `folder`, which exists, through `files`; all ranks call this.

    Raises:
        ShardsError: a rank could not write, naming the reason.
    """
    state = _sharded_state(stage, optimizer, is_loading=False)
    try:
        dist_checkpointing.save(state, str(folder), sharded_strategy=_ThreadSave(files))
    except CheckpointException as error:
        raise ShardsError(f"{folder}: cannot be written: {_cause(error)}") from error


def read_shards(
    folder: Path, stage: MegatronModule, optimizer: MegatronOptimizer | None
) -> dict[str, Any]:
    """Load the state of `model`, and of `optimizer` if it is given; all ranks call this.

    Raises:
        ShardsError: naming the file that is damaged, as far as that can be told.
    """
    _read_small_files(folder)
    wanted = _sharded_state(stage, optimizer, is_loading=True)
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(folder))
    except CheckpointException as error:
        raise ShardsError(f"{folder}: {DAMAGED}: {_cause(error)}") from error
    except Exception as error:  # what damaged bytes are unpickled to can raise anything
        raise ShardsError(f"{folder}: {DAMAGED}: {describe_error(error)}") from error
    return loaded


def _sharded_state(
    stage: MegatronModule, optimizer: MegatronOptimizer | None, *, is_loading: bool
) -> dict[str, Any]:
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


class _ThreadSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron-Core's names and shardings, torch's writer."""

    def __init__(self, files: FileSystem) -> None:
        super().__init__("torch_dist", 1)
        self.files = files

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path | str) -> None:
        """Write this rank's shards in this process."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=_HashingWriter(checkpoint_dir, self.files),
            # Names are flat already, and a search for nested ones would copy the whole state.
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=False,
                flatten_state_dict=False,
                flatten_sharded_tensors=False,
            ),
        )


class _HashingWriter(FileSystemWriter):
    """Torch's writer: one file for each rank that has something to write."""

    def __init__(self, folder: Path | str, files: FileSystem) -> None:
        super().__init__(folder)
        self.fs = files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, unless it would be empty."""
        if plan.items:
            return super().write_data(plan, planner)
        nothing: Future[list[WriteResult]] = Future()
        nothing.set_result([])
        return nothing


class HashingFiles(FileSystem):
    """Files on a disk, with the digests of those that were written, by name."""

    def __init__(self) -> None:
        """Begin with no file."""
        self.digests: dict[str, FileDigest] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file to write; `digests` has it when the block ends."""
        path = Path(path)
        with path.open(mode) as file, ThreadPoolExecutor(1) as thread:
            stream = _HashingStream(file, thread)
            yield stream
        self.digests[path.name] = stream.digest()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Give a file that was written its final name."""
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _HashingStream(io.IOBase):
    """A file that is written from its beginning to its end, and hashed meanwhile."""

    def __init__(self, file: IO[Any], thread: Executor) -> None:
        self._file = file
        self._thread = thread
        self._sha256 = hashlib.sha256()
        self._bytes = 0

    def write(self, content: Any) -> int:
        """Write all of `content` (bytes or a buffer of bytes)."""
        size = len(content)
        if size < PARALLEL_BYTES:
            self._sha256.update(content)
            self._file.write(content)
        else:  # hashing and writing both release Python's lock, so they run at the same time
            hashed = self._thread.submit(self._sha256.update, content)
            self._file.write(content)
            hashed.result()
        self._bytes += size
        return size

    def digest(self) -> FileDigest:
        """Return the digest of what was written."""
        return FileDigest(self._bytes, self._sha256.hexdigest())

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._bytes

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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
