"""Measure the sample order, with megatron-core's index builder side by side in the same run.

python tools/bench_order.py --documents 4000000
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from tqdm import tqdm

from benchmarks.order_corpora import Bench
from benchmarks.order_parts import PARTS, Measured, measure_parts
from benchmarks.order_table import as_text, figures
from megatron_ettin.command_parser import CommandParser


def main() -> None:
    """Measure every part and report."""
    args = parse_arguments()
    measured: Measured = {}
    with tempfile.TemporaryDirectory(prefix="bench_order.", dir=args.work_dir) as folder:
        prefixes = (f"{folder}/{name}" for name in ("large", "loaded"))
        bench = Bench(Path(folder), *prefixes, args.documents, args.threads)
        for part in tqdm(measure_parts(bench), total=len(PARTS), disable=None):
            measured |= part
    print(as_text(measured, documents=args.documents, threads=args.threads))
    if args.json:
        print(json.dumps(figures(measured)))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--documents", type=int, default=4_000_000, help="documents of the planned corpus (4 M)")
    add("--threads", type=int, default=os.cpu_count(), help="threads of the parallel index build")
    add("--work-dir", type=Path, help="folder for temporary files, which are removed")
    add("--json", action="store_true", help="end with one JSON object")
    args = parser.parse_args()
    if args.documents < 1 or args.threads < 1:
        parser.error("--documents and --threads must be at least 1")
    return args


if __name__ == "__main__":
    main()
