"""Measure models in tasks: Hugging Face folders or repositories, ours or published."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_ettin.command_parser import CommandParser

MODEL_HELP = "folder, or repository of the Hub; NAME=FOLDER names it in results"
CONFIG_HELP = "YAML file with tasks, such as examples/evaluation/nano.yaml"
OUTPUT_HELP = "folder of the results; what is there already is not measured again"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure what has no result yet, print the table; exit with 1 if something failed."""
    args = parse_arguments(arguments)
    if not sys.warnoptions:
        # Warnings of Megatron-Core's import would bury the table.
        warnings.filterwarnings("ignore", module=r"megatron\.")
    from megatron_ettin.evaluation.measure import measure_all, units
    from megatron_ettin.evaluation.model import open_models
    from megatron_ettin.evaluation.results import ResultStore
    from megatron_ettin.evaluation.score_table import score_table
    from megatron_ettin.evaluation.task_file import read_tasks

    try:
        tasks = read_tasks(args.config, args.tasks)
        models = open_models(args.models)
        for task in tasks.values():
            task.check()
        chosen, results, num_failures = units(models, tasks), [], 0
        for number, outcome in enumerate(measure_all(chosen, ResultStore(args.output)), start=1):
            print(f"[{number}/{len(chosen)}] {outcome}", file=sys.stderr)
            num_failures += outcome.failure is not None
            if outcome.result is not None:
                results.append(outcome.result)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print("\n".join(score_table(results)))
    if num_failures:
        raise SystemExit(f"error: {num_failures} of {len(chosen)} measurements failed (see above)")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    add("--config", type=Path, required=True, metavar="FILE", help=CONFIG_HELP)
    add("--tasks", nargs="+", default=(), metavar="NAME", help="tasks of the file; default: all")
    add("--output", type=Path, default=Path("results"), metavar="DIR", help=OUTPUT_HELP)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
