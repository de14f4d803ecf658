"""Measure passes over a corpus in memory: `order.py search` and `order.py contaminated`.

python tools/bench_scan.py --mb 256
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from benchmarks.scan_times import scan_times
from megatron_ettin.command_parser import CommandParser
from megatron_ettin.text_table import text_table


def main() -> None:
    """Measure each pass and report."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="bench_scan.", dir=args.work_dir) as folder:
        tokens, rounds = args.mb * 500_000, args.rounds
        measured = scan_times(Path(folder), tokens=tokens, passages=args.passages, rounds=rounds)
        times = list(measured)
    columns = ["pass", "dtype", "GB/s of one core", "found"]
    rows = [
        [time.name, time.dtype, f"{time.gigabytes_per_second:.2f}", f"{time.found:,}"]
        for time in times
    ]
    print(*text_table(columns, rows, numbers=columns[2:]), sep="\n")
    if args.json:
        print(json.dumps([dataclasses.asdict(time) for time in times]))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--mb", type=int, default=64, help="10^6 bytes of the corpus in uint16 (64)")
    add("--passages", type=int, default=2000, help="texts of 60 words whose sequences are searched")
    add("--rounds", type=int, default=7, help="runs of each pass; the fastest counts (7)")
    add("--work-dir", type=Path, help="folder for temporary files, which are removed")
    add("--json", action="store_true", help="end with one JSON list: pass, dtype, speed, found")
    args = parser.parse_args()
    if args.mb < 1 or args.rounds < 1 or args.passages < 100:
        parser.error("--mb and --rounds must be at least 1, and --passages at least 100")
    return args


if __name__ == "__main__":
    main()
