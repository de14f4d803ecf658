"""Run a study: train the arms, evaluate all models, draw one page (docs/study.md)."""

import sys
import warnings
from collections.abc import Sequence

from megatron_ettin.study.command_line import parse, study_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, plan, run; exit code 1 if a stage failed or an input cannot be used."""
    options = parse(arguments)
    if not sys.warnoptions:
        # Warnings of Megatron-Core's import would bury a one-line error.
        warnings.filterwarnings("ignore", module=r"megatron\.")
    try:
        code = study_command(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
