"""Writer of a checkpoint's shards: a thread copies them in host memory, writes and hashes them.

Megatron-Core's own writer forks a process for each file and keeps a manager process for their
results. Those outlive a rank that fails and hold its output open. Torch's writer of the same
`torch_dist` format needs no process (docs/decisions/0014-saving-beside-training.md).

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from shutil import disk_usage
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper

from megatron_ettin import distributed
from megatron_ettin.file_digests import FileDigest
from megatron_ettin.hashing_files import HashingFiles
from megatron_ettin.shards import ShardsError, describe_error, sharded_state

#: Most bytes that a file needs for each of its tensors beside the numbers; .metadata has as many.
BYTES_PER_TENSOR = 8192


@dataclass(frozen=True)
class _Plan:
    """Plan of a save, which holds for all saves of the same tensors."""

    local: SavePlan
    """Tensors and objects of this rank."""
    agreed: SavePlan
    """Those that this rank writes, and to which file."""
    metadata: Metadata | None
    """Description of all ranks' shards; on the main rank."""


@dataclass(frozen=True)
class RankPart:
    """Result of one rank's thread."""

    refusal: str = ""
    """File that the disk refuses, and why; empty if all is written."""
    digests: Mapping[str, FileDigest] = field(default_factory=dict)
    """Files that the rank has written and synced."""
    results: list[WriteResult] = field(default_factory=list)
    """Place of each tensor in the files."""


class ShardSaver:
    """Writes shards of the same model again and again, each time in a thread.

    From one save to the next it keeps the plan and the host memory of the copies, which has the
    size of the shards that this rank writes.
    """

    def __init__(self, *, copies: bool = True) -> None:
        """Without `copies` the tensors must not change until the shards are written."""
        self._copies = copies
        self._memory: dict[MetadataIndex, torch.Tensor] = {}
        self._plan: _Plan | None = None

    def begin(
        self,
        folder: Path,
        stage: MegatronModule,
        optimizer: MegatronOptimizer | None,
        *,
        files: FileSystem | None = None,
    ) -> PendingShards:
        """Begin to copy the shards and write them to `folder`, which exists; all ranks call this.

        The tensors must stay until `PendingShards.wait_for_copy` returns. The thread of the save
        before has ended. `files` writes without hashing, for comparison.

        Raises:
            ShardsError: the disk has no room, or refuses; on all ranks. No thread runs then.
        """
        state, refusal = _sharded_tensors(folder, stage, optimizer, validate=self._plan is None)
        planner = _Planner(
            dedup_replicated_tensors=False,
            # Names are flat already, and a search for nested ones would copy the whole state.
            flatten_state_dict=False,
            flatten_sharded_tensors=False,
        )
        planner.set_up_planner(state, is_coordinator=distributed.is_main_rank())
        local = planner.create_local_plan()
        num_bytes = sum(_num_bytes(planner, item) for item in local.items)
        is_known = self._plan is not None and self._plan.local == local
        free = disk_usage(folder).free if distributed.is_main_rank() else 0
        told = distributed.all_gather((refusal, num_bytes, len(local.items), is_known, free))
        refusals, sizes, counts, known, (free, *_) = zip(*told, strict=True)
        if any(refusals):
            raise ShardsError(f"{folder}: cannot be written: {next(filter(None, refusals))}")
        _require_space(folder, sum(sizes) + sum(counts) * BYTES_PER_TENSOR, free)
        writer = _writer(folder, HashingFiles() if files is None else files)
        if self._plan is None or not all(known):
            self._plan = _agree(planner, writer, local)
        memory = self._memory if self._copies else None
        if memory is not None and distributed.device().type == "cuda":
            # On the stream of the training, which this thread alone may use.
            planner.copy(self._plan.agreed, memory)
            memory = None
        return PendingShards(folder, self._plan, planner, writer, sum(sizes), memory)


class PendingShards:
    """Shards that a thread of this rank writes."""

    def __init__(
        self,
        folder: Path,
        plan: _Plan,
        planner: _Planner,
        writer: FileSystemWriter,
        num_bytes: int,
        memory: dict[MetadataIndex, torch.Tensor] | None,
    ) -> None:
        """Start the thread, which first copies the tensors to `memory`, unless it is None."""
        self.num_bytes = num_bytes
        """Bytes of the tensors of all ranks."""
        self._folder, self._plan, self._writer, self._memory = folder, plan, writer, memory
        self._copied = Event()
        self._part: Future[RankPart] = Future()
        # A rank that fails does not wait for it.
        Thread(target=self._write, args=[planner], name="checkpoint", daemon=True).start()

    @property
    def is_written(self) -> bool:
        """This rank's thread has ended, well or not."""
        return self._part.done()

    def wait_for_copy(self) -> None:
        """Wait until the tensors may change."""
        self._copied.wait()

    def gather(self) -> list[RankPart]:
        """Wait for the threads of all ranks; return their parts on the main rank, [] elsewhere.

        All ranks call this. An error in a thread that is not the disk's is raised on its rank.
        """
        return distributed.gather(self._part.result())

    def finish(self, parts: list[RankPart]) -> dict[str, FileDigest]:
        """Write what describes the shards, on the main rank; return the digests of all files.

        Small files of Megatron-Core's may not be among the digests.

        Raises:
            ShardsError: a rank could not write, naming the reason.
            OSError: this rank cannot.
        """
        for part in parts:
            if part.refusal:
                raise ShardsError(part.refusal)
        assert self._plan.metadata is not None
        self._writer.finish(self._plan.metadata, [part.results for part in parts])
        save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))
        digests = {name: file for part in parts for name, file in part.digests.items()}
        return digests | _digests(self._writer.fs)

    def _write(self, planner: _Planner) -> None:
        """Copy the tensors and write this rank's file, unless it would be empty."""
        plan = self._plan.agreed
        try:
            try:
                if self._memory is not None:
                    planner.copy(plan, self._memory)
            finally:
                self._copied.set()
            results = self._writer.write_data(plan, planner).wait() if plan.items else []
            self._part.set_result(RankPart("", _digests(self._writer.fs), results))
        except OSError as error:
            refusal = f"{error.filename or self._folder}: cannot be written: {error.strerror}"
            self._part.set_result(RankPart(refusal))
        except BaseException as error:  # raised in the main thread by `gather`
            self._part.set_exception(error)


class _Planner(MCoreSavePlanner):  # type: ignore[misc]
    """Megatron-Core's planner, which answers with copies once they are made."""

    _copied: dict[MetadataIndex, Any] | None = None

    def copy(self, plan: SavePlan, memory: dict[MetadataIndex, torch.Tensor]) -> None:
        """Copy what `plan` has into `memory`, which grows by what it lacks."""
        copied: dict[MetadataIndex, Any] = {}
        # In fp32 the optimizer's weights are the model's, under another name.
        known: dict[tuple[int, torch.Size, torch.dtype], MetadataIndex] = {}
        for item in plan.items:
            data = self.resolve_data(item)
            if isinstance(data, torch.Tensor):
                first = known.setdefault((data.data_ptr(), data.shape, data.dtype), item.index)
                data = copied[first] if first in copied else _copy(data.detach(), memory, first)
            copied[item.index] = data
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._copied = copied
        self.state_dict: dict[str, Any] = {}  # frees what the optimizer has gathered

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return the tensor, or the bytes of an object, that a file gets."""
        if self._copied is not None:
            found: torch.Tensor | io.BytesIO = self._copied[write_item.index]
            return found
        live: torch.Tensor | io.BytesIO = super().resolve_data(write_item)
        return live


class _Capture(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Takes from `dist_checkpointing.save` the tensors with their names, and writes nothing."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.state: dict[str, Any] = {}

    def async_save(self, sharded_state_dict: dict[str, Any], *_: object) -> AsyncRequest:
        """Keep the tensors of this rank."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        self.state = mcore_to_pyt_state_dict(by_key, False)
        return AsyncRequest(None, (), [])


def _sharded_tensors(
    folder: Path, stage: MegatronModule, optimizer: MegatronOptimizer | None, *, validate: bool
) -> tuple[dict[str, Any], str]:
    """Return this rank's tensors by name, and why `folder` refuses Megatron-Core's small files."""
    state = sharded_state(stage, optimizer, is_loading=False)
    capture = _Capture()
    try:
        dist_checkpointing.save(
            state,
            str(folder),
            sharded_strategy=capture,
            async_sharded_save=True,
            validate_access_integrity=validate,
        )
    except (OSError, RuntimeError) as error:
        # The main rank has shared in all collectives when it writes.
        if not distributed.is_main_rank():
            raise
        return {}, describe_error(error)
    return capture.state, ""


def _agree(planner: _Planner, writer: FileSystemWriter, local: SavePlan) -> _Plan:
    """Agree with all ranks on who writes what."""
    metadata: Metadata | None = None

    def share(plans: list[SavePlan]) -> list[SavePlan]:
        nonlocal metadata
        plans, metadata = planner.create_global_plan(plans)
        return writer.prepare_global_plan(plans)

    agreed = _DistWrapper(None, True, 0).reduce_scatter("plan", lambda: local, share)
    return _Plan(local, planner.finish_plan(agreed), metadata)


def _writer(folder: Path, files: FileSystem) -> FileSystemWriter:
    """Return torch's writer of one file; the tensors are in host memory, and `files` syncs."""
    is_hashing = isinstance(files, HashingFiles)
    writer = FileSystemWriter(folder, sync_files=not is_hashing, per_thread_copy_ahead=0)
    writer.fs = files
    return writer


def _digests(files: object) -> dict[str, FileDigest]:
    return files.digests if isinstance(files, HashingFiles) else {}


def _copy(
    tensor: torch.Tensor, memory: dict[MetadataIndex, torch.Tensor], index: MetadataIndex
) -> torch.Tensor:
    """Copy a tensor to its place in host memory, without waiting for a GPU."""
    place = memory.get(index)
    if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
        place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        memory[index] = place
    if tensor.is_cuda or not tensor.is_contiguous() or tensor.dim() == 0:
        return place.copy_(tensor, non_blocking=True)
    # One thread: torch would wait for all of its threads at each tensor, on busy cores for long.
    np.copyto(place.view(torch.uint8).numpy(), tensor.view(torch.uint8).numpy())
    return place


def _num_bytes(planner: _Planner, item: WriteItem) -> int:
    """Return the bytes of a tensor, or of an object."""
    if item.tensor_data is None:
        data = planner.resolve_data(item)
        assert isinstance(data, io.BytesIO)
        return data.getbuffer().nbytes
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _require_space(folder: Path, num_bytes: int, free: int) -> None:
    """Raise ShardsError unless the disk has room."""
    if free < num_bytes:
        raise ShardsError(
            f"{folder.parent}: a checkpoint needs {num_bytes:,} bytes, but {free:,} are free"
        )
