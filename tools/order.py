"""Ask a run what it was fed, in which order, and what it will be fed next (docs/queries.md)."""

import os
import sys
import warnings
from collections.abc import Sequence

from megatron_ettin.queries.command_line import parse


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, ask, print."""
    if not sys.warnoptions:
        # Warnings of Megatron-Core's import would bury a one-line answer.
        warnings.filterwarnings("ignore", module=r"megatron\.")
    command, args = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        status = command.print_answer(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has enough; Python would complain of it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
