"""Measure what attesting a run costs, and verifying it, at the size of a 2T-token run.

python tools/bench_attest.py --steps 600000
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.attestation import measure
from megatron_ettin.command_parser import CommandParser
from megatron_ettin.text_table import text_facts


def main() -> None:
    """Measure and report."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="bench_attest.", dir=args.work_dir) as folder:
        figures = measure(Path(folder), args.steps)
    print(*text_facts([(name, f"{value:,.5g}") for name, value in figures.items()]), sep="\n")
    if args.json:
        print(json.dumps(figures))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=600_000, help="steps of the ledger (600,000)")
    add("--work-dir", type=Path, help="folder for temporary files, which are removed")
    add("--json", action="store_true", help="end with one JSON object")
    args = parser.parse_args()
    if args.steps < 100:
        parser.error("--steps must be at least 100")
    return args


if __name__ == "__main__":
    main()
