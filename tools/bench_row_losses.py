"""Measure the cost of logging.row_losses as a share of a training step on a CPU.

python tools/bench_row_losses.py --models nano 17m
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from benchmarks.model_sizes import SIZES
from megatron_ettin.command_parser import CommandParser


def main() -> None:
    """Measure each model and report."""
    args = parse_arguments()
    from benchmarks.row_loss_cost import measure
    from megatron_ettin import distributed
    from megatron_ettin.config import HardwareConfig

    report = {}
    with (
        tempfile.TemporaryDirectory(prefix="bench_row_losses.") as folder,
        distributed.process_groups(HardwareConfig(threads_per_rank=1)),
    ):
        for name in args.models:
            cost = measure(name, Path(folder) / name, rows=args.rows, rounds=args.rounds)
            report[name] = {**dataclasses.asdict(cost), "share": cost.share}
            added = 1e6 * (cost.rows_seconds - cost.report_seconds)
            print(
                f"{name}: {cost.rows} rows a step, {cost.step_seconds:.3f} CPU seconds; "
                f"row losses add {added:.0f} us ({cost.share:.3%})",
                flush=True,
            )
    if args.json:
        print(json.dumps(report))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=SIZES, default=["nano", "17m"], metavar="SIZE")
    add("--rows", type=int, default=16, help="rows of 1,024 slots in a step (16)")
    add("--rounds", type=int, default=7, help="timed steps (7)")
    add("--json", action="store_true", help="end with one JSON object: model, seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
