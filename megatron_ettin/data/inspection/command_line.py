"""Commands of tools/dataset.py and their options."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from types import ModuleType

from megatron_ettin.command_parser import CommandParser

DESCRIPTION = "Look into a tokenised corpus (docs/data.md)."

# A command is a module of this folder: `add_arguments` declares its options, and `answer` returns
# something with `passed`, `lines` and `to_json`. Only the module of the given command is imported.
COMMANDS = {
    "verify": "verify files, hashes, inputs, and a sample of the documents: PASS or FAIL",
    "describe": "print sources, counts and lengths of documents; draw the lengths",
    "show": "print a document, decoded, and where it came from",
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
        chosen = importlib.import_module(f"megatron_ettin.data.inspection.{name}")
        command = commands.add_parser(name, help=summary, description=chosen.__doc__)
        command.epilog = f"example: python tools/dataset.py {chosen.EXAMPLE}"
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.set_defaults(figure=None)
        chosen.add_arguments(command)
    args = parser.parse_args(arguments)
    assert chosen is not None, "argparse refuses a command that it does not know"
    return chosen, args
