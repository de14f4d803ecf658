"""Draw any runs over tokens: losses, learning rate, throughput, phases, checkpoints, forks."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_ettin.command_parser import CommandParser

RUN_HELP = "run_dir of a run, finished or not; NAME=RUN_DIR names it"
OUTPUT_HELP = "FILE.png or FILE.html; both are written, of one name"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, read, write FILE.png and FILE.html."""
    args = parse_arguments(arguments)
    from megatron_ettin.evaluation.curves_figure import draw_curves
    from megatron_ettin.evaluation.curves_page import page_of_curves
    from megatron_ettin.evaluation.run_curves import named_folders, read_curves
    from megatron_ettin.evaluation.theme import as_png
    from megatron_ettin.publication import publish_bytes, publish_text

    try:
        folders = named_folders(args.runs)
        runs = [read_curves(name, folder) for name, folder in folders.items()]
        image, page = as_png(partial(draw_curves, runs)), page_of_curves(runs)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        publish_bytes(args.output.with_suffix(".png"), image)
        publish_text(args.output.with_suffix(".html"), page)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{args.output.with_suffix('.png')} and {args.output.with_suffix('.html')}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=OUTPUT_HELP)
    args = parser.parse_args(arguments)
    if args.output.suffix not in (".png", ".html"):
        parser.error(f"--output: {args.output} ends neither in .png nor in .html")
    return args


if __name__ == "__main__":
    main()
