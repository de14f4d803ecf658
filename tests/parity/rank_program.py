"""Program of one of the four ranks of the parity tests.

The four ranks load a checkpoint as TP=2 x PP=2; then the first two as TP=2, while the others do so
as PP=2. Each layout leaves how far its logits are off in OUTPUT/LAYOUT.json, and those that the job
names save the checkpoint again as OUTPUT/LAYOUT.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ettin import checkpoint, distributed
from megatron_ettin.config import HardwareConfig
from megatron_ettin.order.run_folder import CONFIG_FILE
from tests.parity.references import Packed, difference
from tests.parity.stages import load_stage, stage_logits

ALL = HardwareConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
HALVES = (HardwareConfig(tensor_parallel_size=2), HardwareConfig(pipeline_parallel_size=2))


@dataclass(frozen=True)
class Job:
    """A checkpoint, the file of logits expected of it, and the folder for what the ranks leave."""

    checkpoint: Path
    expected: Path
    output: Path
    saving: Sequence[str]
    """Layouts that save the checkpoint again."""
    ports: Sequence[int]
    """Where the ranks of the three worlds meet."""


def main(job: Job) -> None:
    rank = int(os.environ["RANK"])
    half = rank // 2
    run_layout("tp2pp2", ALL, job, rank=rank, world_size=4, port=job.ports[0])
    name = ("tp2", "pp2")[half]
    run_layout(name, HALVES[half], job, rank=rank % 2, world_size=2, port=job.ports[1 + half])


def run_layout(
    name: str,
    hardware: HardwareConfig,
    job: Job,
    *,
    rank: int,
    world_size: int,
    port: int,
) -> None:
    """Load the job's checkpoint in one layout, compare its logits and save it again."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": str(port)}
    folder, output = job.checkpoint, job.output
    with distributed.process_groups(hardware):
        stage = load_stage(folder, hardware)
        logits = stage_logits(stage, Packed.random(stage.model_config.vocab_size))
        if name in job.saving:
            checkpoint.save_weights(
                output / name,
                stage,
                saved=checkpoint.read_model(folder),
                config_yaml=(folder / CONFIG_FILE).read_text(),
                tokenizer_sha256="",
            )
        if logits is not None and distributed.tensor_parallel_rank() == 0:
            found = difference(logits, torch.load(job.expected, mmap=True))
            (output / f"{name}.json").write_text(json.dumps(found))
