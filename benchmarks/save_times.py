"""Cost of a checkpoint: hashing, and the time that training waits for a save beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_ettin.config import HardwareConfig, ModelConfig, OptimizerConfig, SeedConfig
from megatron_ettin.file_digests import FileList, differences
from megatron_ettin.hashing_files import HashingFiles
from megatron_ettin.model.ettin_model import EttinModel
from megatron_ettin.model.provider import build_model
from megatron_ettin.publication import begin_folder, publish_folder
from megatron_ettin.shard_saver import ShardSaver
from megatron_ettin.training.optimizer import build_optimizer


@dataclass(frozen=True, kw_only=True)
class SaveTimes:
    """Medians over the rounds; a save ends when the bytes are on the device."""

    gigabytes: float
    """Weights and optimizer state, 10^9 bytes."""
    save_seconds: float
    """While hashing, and training waits: no copy, no thread beside the training."""
    plain_seconds: float
    """The same without hashing."""
    stall_seconds: float
    """Time that training waits for a save beside it: before it goes on, before its next update for
    the end of the copy, and for the publication."""
    begin_seconds: float
    """The part of it before training goes on."""
    copy_seconds: float
    """The part of it before the update."""
    least_share: float
    """The shortest such wait over the shortest save of the former kind: least disturbed by other
    work, which slows a copy more than a disk."""
    first_stall_seconds: float
    """The wait for the first save of a run, which also takes the memory from the system."""
    check_seconds: float
    """Hashing the files anew, as before a load; they are in memory."""

    def describe_stall(self) -> str:
        """Return the wait for a save beside training, and its share of the other kind of save."""
        return (
            f"{self.stall_seconds:.3f} s, {self.stall_seconds / self.save_seconds:.1%} of a save, "
            f"{self.least_share:.1%} by the shortest of each (begin {self.begin_seconds:.3f} s, "
            f"copy {self.copy_seconds:.3f} s; first save {self.first_stall_seconds:.3f} s)"
        )


def save_times(model: ModelConfig, folder: Path, *, rounds: int) -> SaveTimes:
    """Save a model with its optimizer's state `rounds` times each way, inside process groups.

    `folder` is made and removed.
    """
    stage, optimizer = _model_and_optimizer(model)
    now, beside = ShardSaver(copies=False), ShardSaver()
    # In turns, so that a busy disk slows all kinds alike.
    saves: dict[str, Callable[[], _Save]] = {
        "plain": lambda: _save(folder, stage, optimizer, now, FileSystem()),
        "hashing": lambda: _save(folder, stage, optimizer, now, HashingFiles()),
        "beside": lambda: _save(
            folder,
            stage,
            optimizer,
            beside,
            HashingFiles(),
            passes=lambda: _least_passes(stage),
        ),
    }
    first = saves["beside"]()
    times: dict[str, list[_Save]] = {name: [] for name in saves}
    checks = []
    for _ in range(rounds):
        for name, save in saves.items():
            times[name].append(save())
        checks.append(_check(folder, times["beside"][-1].listed))
    rmtree(folder)

    def median(name: str, seconds: Callable[[_Save], float]) -> float:
        return statistics.median(seconds(save) for save in times[name])

    return SaveTimes(
        gigabytes=sum(file.num_bytes for file in first.listed.files.values()) / 1e9,
        save_seconds=median("hashing", lambda save: save.seconds),
        plain_seconds=median("plain", lambda save: save.seconds),
        stall_seconds=median("beside", lambda save: save.stall_seconds),
        begin_seconds=median("beside", lambda save: save.begin_seconds),
        copy_seconds=median("beside", lambda save: save.copy_seconds),
        least_share=min(save.stall_seconds for save in times["beside"])
        / min(save.seconds for save in times["hashing"]),
        first_stall_seconds=first.stall_seconds,
        check_seconds=statistics.median(checks),
    )


@dataclass(frozen=True)
class _Save:
    begin_seconds: float
    """Until training could go on."""
    copy_seconds: float
    """From the end of the passes until an update could change the tensors."""
    write_seconds: float
    """From then until the thread has ended."""
    publish_seconds: float
    """Until the folder has its name."""
    listed: FileList

    @property
    def stall_seconds(self) -> float:
        return self.begin_seconds + self.copy_seconds + self.publish_seconds

    @property
    def seconds(self) -> float:
        return self.stall_seconds + self.write_seconds


def _save(
    folder: Path,
    stage: EttinModel,
    optimizer: MegatronOptimizer,
    writer: ShardSaver,
    files: FileSystem,
    *,
    passes: Callable[[], object] = lambda: None,
) -> _Save:
    """Save; `passes` is what training does between the save and its next update."""
    rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    pending = writer.begin(begin_folder(folder), stage, optimizer, files=files)
    begun = time.perf_counter()
    passes()
    passed = time.perf_counter()
    pending.wait_for_copy()
    copied = time.perf_counter()
    while not pending.is_written:
        time.sleep(0.001)
    written = time.perf_counter()
    listed = FileList(pending.finish(pending.gather()))
    publish_folder(folder)
    ended = time.perf_counter()
    return _Save(begun - began, copied - passed, written - copied, ended - written, listed)


def _least_passes(stage: EttinModel) -> None:
    """Read all weights and write all gradients once: less than a step does before its update."""
    for weight in stage.parameters():
        weight.grad = weight.detach().clone()


def _check(folder: Path, listed: FileList) -> float:
    begin = time.perf_counter()
    if changed := differences(folder, listed, listed.files):
        raise ValueError(f"what was just written is not there: {changed[0]}")
    return time.perf_counter() - begin


def _model_and_optimizer(model: ModelConfig) -> tuple[EttinModel, MegatronOptimizer]:
    """Build a model in fp32 and take one step, which makes the optimizer's state."""
    hardware = HardwareConfig()
    stage = build_model(model, "bidirectional", hardware, SeedConfig())
    ddp = DistributedDataParallel(
        stage.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False),
        stage,
    )
    optimizer = build_optimizer(ddp, OptimizerConfig(lr=1e-3, weight_decay=0.0), hardware)
    ddp.zero_grad_buffer()
    optimizer.set_lr(1e-3)
    optimizer.step()
    return stage, optimizer
