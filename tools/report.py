"""Report on an encoder and its decoder twin: curves, held-out losses, a linear probe, samples."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, write report.html, report.png and summary.json, print the table."""
    args = parse_arguments(arguments)
    from megatron_ettin.evaluation.report import write_report
    from megatron_ettin.evaluation.table import as_text
    from megatron_ettin.evaluation.twins import compare

    try:
        comparison = compare(tuple(args.encoder), tuple(args.decoder), args.probe)
        write_report(comparison, args.output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(as_text(comparison))
    print(f"\n{args.output / 'report.html'}, report.png and summary.json hold the same")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    folders = {"nargs": 2, "type": Path, "required": True, "metavar": ("RUN_DIR", "MODEL_DIR")}
    for twin in ("encoder", "decoder"):
        add(f"--{twin}", **folders, help=f"finished run of the {twin}, and its to-hf folder")
    probe = "documents with fields text and label (any raw format); no run may have seen them"
    add("--probe", type=Path, required=True, metavar="FILE", help=probe)
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the report")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
