"""Measure a checkpoint of one process: SHA-256, and the wait for a save beside training.

python tools/bench_checkpoint.py --models 17m 150m --work-dir FOLDER
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from benchmarks.model_sizes import SIZES, model_of_size
from megatron_ettin.command_parser import CommandParser
from megatron_ettin.text_table import text_facts


def main() -> None:
    """Measure each model and report."""
    args = parse_arguments()
    from benchmarks.save_times import save_times
    from megatron_ettin import distributed
    from megatron_ettin.config import HardwareConfig

    report = {}
    with (
        tempfile.TemporaryDirectory(prefix="bench_checkpoint.", dir=args.work_dir) as folder,
        distributed.process_groups(HardwareConfig()),
    ):
        for name in args.models:
            times = save_times(model_of_size(name), Path(folder) / name, rounds=args.rounds)
            report[name] = dataclasses.asdict(times)
            facts = [
                (name, f"{times.gigabytes:.3f} GB"),
                ("  saved", f"{times.save_seconds:.2f} s"),
                ("  saved without hashing", f"{times.plain_seconds:.2f} s"),
                ("  wait for a save beside training", times.describe_stall()),
                ("  checked", f"{times.check_seconds:.2f} s"),
            ]
            print(*text_facts(facts), sep="\n", flush=True)
    if args.json:
        print(json.dumps(report))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=SIZES, default=["17m", "150m"], metavar="SIZE")
    add("--rounds", type=int, default=5, help="saves of each kind (5)")
    add("--work-dir", type=Path, help="folder for temporary files, which are removed")
    add("--json", action="store_true", help="end with one JSON object: model, seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
