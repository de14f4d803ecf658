"""Report on any runs: curves, numbers, what differs in their configurations, probe, samples."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_ettin.command_parser import CommandParser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, write report.html, report.png and summary.json, print the tables."""
    args = parse_arguments(arguments)
    if not sys.warnoptions:
        # Warnings of Megatron-Core's import would bury the tables.
        warnings.filterwarnings("ignore", module=r"megatron\.")
    from megatron_ettin.evaluation.comparison import Questions, compare
    from megatron_ettin.evaluation.report import write_report
    from megatron_ettin.evaluation.run_curves import named_folders
    from megatron_ettin.evaluation.table import as_text

    questions = Questions(probe=args.probe, masked_texts=args.masked_text, prompts=args.prompt)
    try:
        comparison = compare(named_folders(args.run), questions)
        write_report(comparison, args.output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(as_text(comparison))
    print(f"\n{args.output / 'report.html'}, report.png and summary.json hold the same")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    run = "run_dir of a run, finished or not; NAME=RUN_DIR names it; repeat it for more runs"
    add("--run", action="append", required=True, metavar="RUN_DIR", help=run)
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the report")
    weights = parser.add_argument_group(
        "measured on the weights", "on each run's newest checkpoint; without these, none is read"
    )
    add = weights.add_argument
    probe = (
        "documents with fields text and label (any raw format) for a linear probe; those that a "
        "run was trained on are left out"
    )
    add("--probe", type=Path, metavar="FILE", help=probe)
    masked = "text with one [MASK], which encoders fill; repeat it for more"
    add("--masked-text", action="append", default=[], metavar="TEXT", help=masked)
    prompt = "beginning of a text, which decoders continue; repeat it for more"
    add("--prompt", action="append", default=[], metavar="TEXT", help=prompt)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
