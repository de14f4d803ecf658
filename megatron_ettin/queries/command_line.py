"""Commands of tools/order.py and their options."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from types import ModuleType

from megatron_ettin.command_parser import CommandParser

DESCRIPTION = (
    "Ask a run what it was fed, in which order, and what it will be fed next (docs/queries.md)."
)

# A command is a module in megatron_ettin/queries/: `add_arguments` declares its options, and
# `print_answer` returns the exit status. Only the module of the given command is imported.
COMMANDS = {
    "plan": "build the row plans; report how documents fill the rows",
    "batch": "show what a step was fed, token by token",
    "docs": "write the documents between two checkpoints to a parquet file",
    "where": "list all rows, steps and checkpoints at which a document is seen",
    "search": "find the documents that contain a text, and when they were seen",
    "contaminated": "report which items of a benchmark share words with what was read",
    "unseen": "draw documents that a checkpoint has not seen",
    "exposures": "count how often a document was seen, and how long ago",
    "losses": "show the losses of sources over tokens, or of a document's rows",
    "spikes": "name the rows and documents whose loss stands out, and leave them out",
    "skips": "list the rows that were left out, and why",
    "diff": "compare two runs",
    "twins": "prove that an encoder and a decoder saw the same tokens: PASS or FAIL",
    "verify": "verify that the record is true and the files are unchanged: PASS or FAIL",
    "export": "write what a run was fed as parquet in the published Ettin layout",
    "import-ettin": "make a corpus from a record in that layout",
    "attest": "sign a statement of what a run was trained on",
    "croissant": "describe the corpora of a run in the Croissant format",
    "training-content": "count what was trained on, in the layout of the EU's template",
    "sql": "query the rows, steps and documents with SQL",
}


def parse(arguments: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """Return the command's module and its options."""
    parser = CommandParser(description=DESCRIPTION)
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
