"""The same run under several parallel layouts: what it computes must not depend on the layout."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_ettin import checkpoint, distributed
from megatron_ettin.checkpoint_files import CheckpointError
from megatron_ettin.config import HardwareConfig, SeedConfig
from megatron_ettin.model.provider import build_stage, logical_parameters
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.text_table import text_table


@dataclass(frozen=True)
class Layout:
    """Processes and the fields of `hardware` by which they share the work."""

    processes: int
    hardware: Mapping[str, bool | int | str] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """Return the overrides of a command line."""
        return [f"--hardware.{name}={value}" for name, value in self.hardware.items()]


TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
LAYOUTS = {
    "tp1": Layout(1),
    "recompute": Layout(1, {"recompute": "full"}),
    "tp2": Layout(2, TP2),
    "tp2sp": Layout(2, {**TP2, "sequence_parallel": True}),
    "cp2": Layout(2, {"context_parallel_size": 2}),
    "pp2": Layout(2, PP2),
    "dp2": Layout(2),
    "dp2_unsharded": Layout(2, {"use_distributed_optimizer": False}),
    "tp2pp2": Layout(4, {**TP2, **PP2}),
    "tp2pp2sp_recompute": Layout(4, {**TP2, **PP2, "sequence_parallel": True, "recompute": "full"}),
    "tp2cp2sp": Layout(4, {**TP2, "context_parallel_size": 2, "sequence_parallel": True}),
    "pp2dp2": Layout(4, PP2),
}


@dataclass(frozen=True)
class Curve:
    """Losses and token digest that a run reported."""

    losses: list[float]
    token_digest: str
    heldout_losses: list[float]

    def largest_relative_difference(self, other: Curve) -> float:
        """Return max |a - b| / |b| over training and held-out losses, step by step."""
        mine, theirs = self.losses + self.heldout_losses, other.losses + other.heldout_losses
        pairs = zip(mine, theirs, strict=True)
        return max(abs(a - b) / abs(b) for a, b in pairs)


def run_layout(layout: Layout, arguments: Sequence[str], run_dir: Path) -> Curve:
    """Train under `layout` with pretrain's `arguments`, one report per step, and read the curve.

    Raises:
        RuntimeError: the run failed; the message ends with its output.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(layout.processes), "-m", "megatron_ettin.pretrain"),
            *arguments,
            *layout.arguments(),
            f"--run_dir={run_dir}",
            "--logging.log_every_steps=1",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{layout}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return read_curve(run_dir)


def read_curve(run_dir: Path) -> Curve:
    """Read run_dir/metrics.jsonl."""
    records = RunFolder(run_dir).read_metrics()
    training = [record for record in records if record["kind"] == "train"]
    return Curve(
        losses=[record["loss"] for record in training],
        token_digest=training[-1]["token_digest"],
        heldout_losses=[r["heldout_loss"] for r in records if r["kind"] == "validation"],
    )


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the newest checkpoint by name, whole, whatever layout wrote them.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = RunFolder(run_dir).newest_checkpoint()
    if folder is None:
        raise CheckpointError(f"{run_dir}: no checkpoint here")
    saved, whole = checkpoint.read_model(folder), HardwareConfig()
    with distributed.process_groups(whole):
        stage = build_stage(saved.model, saved.attention, whole, SeedConfig())
        checkpoint.load(folder, stage, None, saved.model)
        return {name: weight.detach().clone() for name, weight in logical_parameters(stage)}


class Distance(NamedTuple):
    """Distance of a layout's run from the run that it is compared with."""

    loss: float
    """Largest relative difference of a loss."""
    weight: float
    """Largest relative L2 distance of a tensor at the end."""
    has_same_tokens: bool


def distances(run_dirs: Mapping[str, Path], curves: Mapping[str, Curve]) -> dict[str, Distance]:
    """Compare runs, by layout, with the first of them."""
    first = next(iter(curves))
    weights = final_weights(run_dirs[first])
    return {
        name: Distance(
            loss=curve.largest_relative_difference(curves[first]),
            weight=largest_weight_difference(final_weights(run_dirs[name]), weights)[0],
            has_same_tokens=curve.token_digest == curves[first].token_digest,
        )
        for name, curve in curves.items()
    }


def distance_table(curves: Mapping[str, Curve], by_layout: Mapping[str, Distance]) -> Iterator[str]:
    """Yield the lines of a table of layouts; differences are the largest relative ones."""
    numbers = ("processes", "steps", "last loss", "loss differs by", "a tensor at the end by")
    rows = [
        (
            name,
            str(LAYOUTS[name].processes),
            str(len(curve.losses)),
            f"{curve.losses[-1]:.6f}",
            f"{by_layout[name].loss:.1e}",
            f"{by_layout[name].weight:.1e}",
            "same" if by_layout[name].has_same_tokens else "DIFFERENT",
        )
        for name, curve in curves.items()
    ]
    return text_table(("layout", *numbers, "token digest"), rows, numbers=numbers)


def largest_weight_difference(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> tuple[float, str]:
    """Return the largest relative L2 distance of a tensor, |a - b| / |b|, and its name."""
    if set(tensors) != set(expected):
        raise ValueError(f"not the same tensors: {sorted(set(tensors) ^ set(expected))}")
    # In float64: the sum of squares of a large tensor would lose the digits that are compared.
    distances = (
        (float((tensors[name].double() - weight.double()).norm() / weight.double().norm()), name)
        for name, weight in expected.items()
    )
    return max(distances)
