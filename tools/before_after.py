"""Compare a run with the weights it began from: held-out loss by corpus and position, accuracy."""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_ettin.command_parser import CommandParser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, write before_after.html and .json, print the table."""
    args = vars(parse_arguments(arguments))
    # Warnings of Megatron-Core's import would bury a one-line error.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    from megatron_ettin.evaluation.before_after import as_text, measure, write_page

    output = args.pop("output")
    try:
        measured = measure(args.pop("run"), **args)
        write_page(measured, output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(as_text(measured))
    print(f"\n{output / 'before_after.html'} and before_after.json hold the same")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="RUN_DIR", help="run_dir of a run")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the page")
    before = "checkpoint to compare with; default: the run's checkpoint.initialize_from"
    add("--before", type=Path, metavar="DIR", help=before)
    labels = (
        "documents with fields text and label (any raw format) for a linear probe; those that the "
        "run was trained on are left out"
    )
    add("--labels", type=Path, metavar="FILE", help=labels)
    original = "Hugging Face folder whose accuracy is that before; default: of that checkpoint"
    add("--original", type=Path, metavar="HF_DIR", help=original)
    rows = "held-out rows of each corpus; default: validation.num_rows of the run"
    add("--num-rows", type=int, metavar="N", help=rows)
    length = "slots of such a row; default: validation.seq_length of the run"
    add("--seq-length", type=int, metavar="N", help=length)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
