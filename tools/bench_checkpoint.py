"""Measure what the SHA-256 of its files costs a checkpoint, saved and checked by one process.

python tools/bench_checkpoint.py --models 17m 150m --work-dir FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import yaml

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = ("nano", "17m", "32m", "68m", "150m", "400m", "1b")


def main() -> None:
    """Measure each model and report."""
    args = parse_arguments()
    from megatron_ettin import distributed
    from megatron_ettin.config import HardwareConfig, ModelConfig
    from megatron_ettin.evaluation.save_times import save_times

    report = {}
    with (
        tempfile.TemporaryDirectory(prefix="bench_checkpoint.", dir=args.work_dir) as folder,
        distributed.process_groups(HardwareConfig()),
    ):
        for name in args.models:
            fields = yaml.safe_load((EXAMPLES / "model" / f"{name}.yaml").read_text())["model"]
            found = save_times(ModelConfig(**fields), Path(folder) / name, rounds=args.rounds)
            report[name] = dataclasses.asdict(found)
            print(
                f"{name:5} {found.gigabytes:6.3f} GB  saved in {found.save_seconds:6.2f} s, "
                f"{found.plain_seconds:6.2f} s without hashing  checked in "
                f"{found.check_seconds:6.2f} s",
                flush=True,
            )
    if args.json:
        print(json.dumps(report))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=SIZES, default=["17m", "150m"], metavar="SIZE")
    add("--rounds", type=int, default=5, help="saves of each kind (5)")
    add("--work-dir", type=Path, help="where a temporary folder is made and removed")
    add("--json", action="store_true", help="end with one JSON object: model, seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
