"""The options of the commands that compare two runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_two_runs(parser: argparse.ArgumentParser, example: str) -> None:
    """Add --run, to be given twice, and --json, and the example that ends the help."""
    parser.epilog = f"example: python tools/order.py {example}"
    add = parser.add_argument
    run = "run_dir of a run; give it twice"
    add("--run", type=Path, action="append", required=True, metavar="DIR", help=run)
    add("--json", action="store_true", help="print one JSON object")


def two_runs(args: argparse.Namespace) -> tuple[Path, Path]:
    """Return the two folders; ValueError if there are not two."""
    if len(args.run) != 2:
        raise ValueError(f"--run: give it twice, not {len(args.run)} times")
    return args.run[0], args.run[1]
