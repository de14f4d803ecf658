"""Measure questions to a run of any size, which is made up: time and memory of each.

python tools/bench_queries.py --documents 2700000000 --shards 200 --work-dir FOLDER
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from megatron_ettin.command_parser import CommandParser


def main() -> None:
    """Make the run, ask each question and report."""
    args = parse_arguments()
    from tqdm import tqdm

    from benchmarks.full_run import FullRun
    from benchmarks.query_times import QUESTIONS, as_json, as_text, ask_all

    with tempfile.TemporaryDirectory(prefix="bench_queries.", dir=args.work_dir) as folder:
        run = (
            args.run
            or FullRun(
                folder=Path(folder),
                documents=args.documents,
                shards=args.shards,
                step_rows=args.step_rows,
            ).make()
        )
        answers = list(tqdm(ask_all(run, Path(folder)), total=len(QUESTIONS), disable=None))
    print(as_json(answers) if args.json else as_text(answers))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--documents", type=int, default=27_000_000, help="documents of all sources (27 M)")
    add("--shards", type=int, default=20, help="shards of all sources (20)")
    add("--step-rows", type=int, default=3072, help="rows of a step of the first phase (3,072)")
    add("--run", type=Path, metavar="DIR", help="ask a run that is there; make none")
    add("--work-dir", type=Path, help="folder for temporary files, which are removed")
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    main()
