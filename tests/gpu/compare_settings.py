"""Train one short run of a published size under several settings of the `hardware` section.

python -m tests.gpu.compare_settings 400m precision=bf16 precision=fp8

A setting is FIELD=VALUE[,FIELD=VALUE...]. Prints losses and tokens per second of each, and how far
the losses are from the first one's, as one line of JSON. Reports a step: a little slower than
training, for all alike.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

import yaml

from megatron_ettin.evaluation.layouts import Curve, Layout, read_curve, run_layout

STEPS, ROWS, SEQ_LENGTH = 60, 16, 1024
#: Steps before which speed does not count: kernels are compiled, memory is allocated.
WARM_UP_STEPS = 10


def main() -> None:
    """Train with each setting in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="of examples/model/")
    parser.add_argument("settings", nargs="+")
    arguments = parser.parse_args()
    curves, speeds = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        phase = Path(scratch, "phase.yaml")
        phase.write_text(yaml.safe_dump(short_phase()))
        files = [
            f"examples/model/{arguments.model}.yaml",
            "examples/data/quickstart.yaml",
            "examples/objective/mlm.yaml",
            str(phase),
        ]
        for setting in arguments.settings:
            hardware = dict(field.split("=", 1) for field in setting.split(","))
            run_dir = Path(scratch, "run")
            run_layout(Layout(1, hardware), [f"--config={file}" for file in files], run_dir)
            curves[setting], speeds[setting] = read_curve(run_dir), tokens_per_second(run_dir)
            shutil.rmtree(run_dir)  # gigabytes of checkpoints
    print(json.dumps(described(curves, speeds)))


def short_phase() -> dict[str, object]:
    """Return the sections of a run of STEPS micro-batches, warmed up over a tenth of them."""
    tokens = STEPS * ROWS * SEQ_LENGTH
    phase = {
        "name": "pretrain",
        "train_tokens": tokens,
        "seq_length": SEQ_LENGTH,
        "global_batch_size": ROWS,
    }
    return {
        "phases": [phase],
        "optimizer": {"warmup_tokens": tokens // 10},
        "hardware": {"micro_batch_tokens": ROWS * SEQ_LENGTH},
        "validation": {"every_tokens": None},
    }


def tokens_per_second(run_dir: Path) -> float:
    """Return the median over the steps after the warm-up."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return statistics.median(record["tokens_per_second"] for record in steps[WARM_UP_STEPS:])


def described(curves: dict[str, Curve], speeds: dict[str, float]) -> dict[str, object]:
    """Return what was measured, by setting; speeds and losses are relative to the first too."""
    first = next(iter(curves))
    return {
        setting: {
            "losses": curve.losses,
            "heldout_losses": curve.heldout_losses,
            "largest_relative_difference": curve.largest_relative_difference(curves[first]),
            "tokens_per_second": speeds[setting],
            "relative_speed": speeds[setting] / speeds[first],
        }
        for setting, curve in curves.items()
    }


if __name__ == "__main__":
    main()
