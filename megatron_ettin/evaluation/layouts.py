"""The same run under several parallel layouts: its losses must not depend on the layout."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """Processes, and how the model is divided among them; the rest is data-parallel."""

    processes: int
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1


LAYOUTS = {
    "tp1": Layout(1),
    "tp2": Layout(2, tensor_parallel_size=2),
    "pp2": Layout(2, pipeline_parallel_size=2),
    "dp2": Layout(2),
    "tp2pp2": Layout(4, tensor_parallel_size=2, pipeline_parallel_size=2),
}


@dataclass(frozen=True)
class Curve:
    """What a run reported."""

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
            f"--run_dir={run_dir}",
            f"--hardware.tensor_parallel_size={layout.tensor_parallel_size}",
            f"--hardware.pipeline_parallel_size={layout.pipeline_parallel_size}",
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
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    training = [record for record in records if record["kind"] == "train"]
    return Curve(
        losses=[record["loss"] for record in training],
        token_digest=training[-1]["token_digest"],
        heldout_losses=[r["heldout_loss"] for r in records if r["kind"] == "validation"],
    )
