"""Checkpoints by whatever this process sees, a GPU or none.

`python -m tests.gpu.weights save|load PRECISION FOLDER FILE` leaves in FILE the weights that the
checkpoint FOLDER was made of, or that were loaded from it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from megatron_ettin import checkpoint, distributed
from megatron_ettin.config import HardwareConfig, SeedConfig
from megatron_ettin.model.provider import build_model, logical_parameters
from tests.parity.runs import make_run, save_run


def save(folder: Path, precision: str) -> dict[str, torch.Tensor]:
    """Write a checkpoint and return its weights by their names here, on the CPU."""
    run = make_run("decoder", Path("tokenizer"))
    saved = save_run(folder, run, "pretrain", "", precision)
    return {name: weight.cpu() for name, weight in saved.items()}


def load(folder: Path, precision: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint after loading them into a model, on the CPU."""
    saved, hardware = checkpoint.read_model(folder), HardwareConfig(precision=precision)
    with distributed.process_groups(hardware):
        stage = build_model(saved.model, saved.attention, hardware, SeedConfig())
        checkpoint.load(folder, stage, None, saved.model)
        return {name: weight.detach().cpu() for name, weight in logical_parameters(stage)}


def main() -> None:
    verb, precision, folder, file = sys.argv[1:]
    torch.save({"save": save, "load": load}[verb](Path(folder), precision), file)


if __name__ == "__main__":
    main()
