"""Measure preprocessing beside gigatoken, Megatron-LM's ways and datatrove, on the same raw text.

python tools/bench_preprocess.py --mb 200 --rounds 3 --keep runs/bench_text --json
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from benchmarks.preprocess_bench import measure
from benchmarks.preprocess_rounds import CONTENDERS, ContenderError
from benchmarks.preprocess_table import as_text
from megatron_ettin.command_parser import CommandParser


def main() -> None:
    """Make the text, measure, report."""
    args = parse_arguments()
    try:
        with tempfile.TemporaryDirectory(prefix="bench_preprocess.", dir=args.keep) as folder:
            measured, missing = measure(args, Path(folder), say=tqdm.write)
    except (ValueError, OSError, ContenderError) as error:
        sys.exit(f"error: {error}")
    print(as_text(measured, missing))
    if args.json:
        print(json.dumps(measured))
    if measured["same_as_mcore"] is False:
        sys.exit("error: our corpus differs from megatron-core's")


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--mb", type=float, default=200, help="size of the text in MB (200)")
    add("--part-mb", type=float, default=20, help="size for megatron and datatrove (20)")
    add("--files", type=int, default=4, help="files of the text (4)")
    add("--rounds", type=int, default=3, help="runs of each contender (3)")
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    add("--processes", type=int, default=2, help="processes of megatron and datatrove (2)")
    add("--input", nargs="+", type=Path, metavar="FILE", help="JSON lines to read instead")
    add("--text", type=Path, default=Path("quickstart/text"), help="the quickstart's text; fetched")
    add("--tokenizer", type=Path, default=Path("quickstart/tokenizer"), help="trained if missing")
    add("--keep", type=Path, metavar="FOLDER", help="keep the text here, and find it here again")
    add("--json", action="store_true", help="end with one JSON object")
    args = parser.parse_args()
    if min(args.mb, args.part_mb, args.files, args.rounds, args.processes) <= 0:
        parser.error("sizes and counts must be above 0")
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
