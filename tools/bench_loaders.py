"""Compare how loaders resume with other settings, and what they cost, each in its own process.

python tools/bench_loaders.py --output loaders --cases 1000 --rivals-python rivals/bin/python
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from benchmarks.loaders.contest import RIVALS, read_outcomes
from benchmarks.loaders.processes import measure
from benchmarks.loaders.summary import report, tally
from megatron_ettin.command_parser import CommandParser


def main() -> None:
    """Measure the loaders that are installed and report; what FOLDER holds is not run again."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    costs = measure(
        args.loaders,
        args.output,
        cases=args.cases,
        megabytes=args.megabytes,
        rivals_python=args.rivals_python,
    )
    outcomes = {name: read_outcomes(args.output / f"{name}.jsonl") for name in args.loaders}
    tallies = {name: tally(of_loader) for name, of_loader in outcomes.items()}
    text = report(tallies, costs)
    (args.output / "loaders.md").write_text(text)
    counts = {
        name: {axis: dataclasses.asdict(each) for axis, each in by_axis.items()}
        for name, by_axis in tallies.items()
    }
    figures = json.dumps({"cases": counts, "costs": costs}, indent=1)
    (args.output / "loaders.json").write_text(figures + "\n")
    print(text)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for corpora, cases and the report")
    add("--cases", type=int, default=1000, help="cases of each axis (1000)")
    add("--megabytes", type=int, default=20, help="tokens of the corpus for costs, in MB (20)")
    add("--loaders", nargs="+", choices=tuple(RIVALS), default=tuple(RIVALS), metavar="NAME")
    add("--rivals-python", default=sys.executable, help="with benchmarks/loaders/requirements.txt")
    args = parser.parse_args()
    if args.cases < 1 or args.megabytes < 1:
        parser.error("--cases and --megabytes must be at least 1")
    return args


if __name__ == "__main__":
    main()
