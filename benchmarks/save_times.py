"""Cost of hashing a checkpoint: while it is saved, and before it is loaded."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_ettin.config import HardwareConfig, ModelConfig, OptimizerConfig, SeedConfig
from megatron_ettin.file_digests import FileList, differences
from megatron_ettin.model.ettin_model import EttinModel
from megatron_ettin.model.provider import build_model
from megatron_ettin.shards import HashingFiles, save_to
from megatron_ettin.training.optimizer import build_optimizer


@dataclass(frozen=True, kw_only=True)
class SaveTimes:
    """Medians over the rounds; a save ends when the bytes are on the device."""

    gigabytes: float
    """Weights and optimizer state, 10^9 bytes."""
    save_seconds: float
    """While hashing."""
    plain_seconds: float
    """The same writer without hashing, in turn with the former."""
    check_seconds: float
    """Hashing the files anew, as before a load; they are in memory."""


def save_times(model: ModelConfig, folder: Path, *, rounds: int) -> SaveTimes:
    """Save a model with its optimizer's state `rounds` times each way, inside process groups.

    `folder` is made and removed.
    """
    stage, optimizer = _model_and_optimizer(model)
    plain, hashing, checks = [], [], []
    listed = FileList({})
    # In turns, so that a busy disk slows both kinds alike.
    for _ in range(rounds):
        plain.append(_save(folder, stage, optimizer, FileSystem()))
        files = HashingFiles()
        hashing.append(_save(folder, stage, optimizer, files))
        listed = FileList(files.digests)
        checks.append(_check(folder, listed))
    rmtree(folder)
    return SaveTimes(
        gigabytes=sum(file.num_bytes for file in listed.files.values()) / 1e9,
        save_seconds=statistics.median(hashing),
        plain_seconds=statistics.median(plain),
        check_seconds=statistics.median(checks),
    )


def _save(
    folder: Path, stage: EttinModel, optimizer: MegatronOptimizer, files: FileSystem
) -> float:
    rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin = time.perf_counter()
    save_to(folder, stage, optimizer, files)
    return time.perf_counter() - begin


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
