"""Ask a run what it was fed, in which order, and what it will be fed next (docs/queries.md)."""

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

# A command is a module in megatron_ettin/queries/: `add_arguments` declares its options, and
# `print_answer` returns the exit status. Only the module of the given command is imported.
COMMANDS = {
    "plan": "build the row plans; say how documents fill the rows",
    "batch": "what a step was fed, token for token",
    "docs": "documents between two checkpoints, to a parquet file",
    "where": "all steps, slots and checkpoints at which a document is seen",
    "unseen": "documents that a checkpoint has not seen",
    "exposures": "how often a document was seen, and how long ago",
    "diff": "where two runs differ",
    "twins": "did an encoder and a decoder see the same tokens: PASS or FAIL, with the proof",
    "verify": "is the record true, and are the files still those it was made of",
    "export": "what a run was fed, as parquet in the published Ettin layout",
    "import-ettin": "make a corpus of a record in that layout",
    "sql": "SQL over the order, the steps and the documents",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, ask, print."""
    if not sys.warnoptions:
        # What Megatron-Core says while it is imported would bury a one-line answer.
        warnings.filterwarnings("ignore", module=r"megatron\.")
    command, args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
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


def parse_arguments(arguments: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """Return the command's module and its options."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    chosen = None
    for name, summary in COMMANDS.items():
        if name not in arguments[:1]:
            commands.add_parser(name, help=summary)
            continue
        chosen = importlib.import_module(f"megatron_ettin.queries.{name.replace('-', '_')}")
        chosen.add_arguments(commands.add_parser(name, help=summary, description=chosen.__doc__))
    args = parser.parse_args(arguments)
    assert chosen is not None, "argparse refuses a command that it does not know"
    return chosen, args


if __name__ == "__main__":
    main()
