"""Parser of every command: help that begins with the purpose, and the nearest name for a typo."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Collection, Sequence
from typing import Any

#: Titles that argparse gives to options without a group.
UNTITLED = ("positional arguments", "options")


def nearest(name: str, known: Collection[str]) -> str | None:
    """Return the known name that a name was probably meant to be; None if none is near."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def hint(name: str, known: Collection[str]) -> str:
    """Return `; did you mean NAME?`, or nothing if no known name is near."""
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else ""


def check_options(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Raise ValueError at the first option that a parser does not know, with the nearest one.

    Names below an option that has no known name below it pass (`--data.blend.pretrain`), and all
    after `--`; so do beginnings of options if the parser takes these.
    """
    known = parser._option_string_actions
    sections = {name.rpartition(".")[0] for name in known if not name.endswith(".help")}
    for argument in arguments:
        if argument == "--":
            return
        option = argument.partition("=")[0].removesuffix("+")  # `--phases+` appends
        if not option.startswith("--"):
            continue
        if parser.allow_abbrev and any(name.startswith(option) for name in known):
            continue
        above = option
        while above and above not in known:
            above = above.rpartition(".")[0]
        if not above or above in sections:
            raise ValueError(f"{option}: no such option{hint(option, known)}")


class HelpFirst:
    """Help that begins with what a command does and its groups of options, before the usage."""

    description: str | None
    _action_groups: list[Any]

    def format_help(self) -> str:
        """Return the help."""
        description, self.description = self.description, None
        try:
            rest: str = super().format_help()  # type: ignore[misc]
        finally:
            self.description = description
        titles = [group.title for group in self._action_groups if group._group_actions]
        # A title is a sentence of a docstring, of which the first clause names the group.
        named = {title.partition(";")[0]: None for title in titles if title not in UNTITLED}
        groups = f"Groups of options: {'; '.join(named)}.\n" if named else ""
        return f"{(description or '').strip()}\n{groups}\n{rest}"


class CommandParser(HelpFirst, argparse.ArgumentParser):
    """Parser of a tool: names the nearest option, command or value for one that it lacks."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Check the options first: argparse would complain of missing ones before."""
        given = list(sys.argv[1:] if args is None else args)
        try:
            check_options(self._own(given), self)
        except ValueError as error:
            self.error(str(error))
        return super().parse_known_args(given, namespace)

    def _own(self, arguments: Sequence[str]) -> list[str]:
        """Return the arguments before the name of a command, whose parser checks the rest."""
        commands = [
            action for action in self._actions if isinstance(action, argparse._SubParsersAction)
        ]
        begins = [i for i, each in enumerate(arguments) if not each.startswith("-")]
        return list(arguments[: begins[0]] if commands and begins else arguments)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            known = [str(choice) for choice in action.choices or ()]
            message = f"{error.message}{hint(str(value), known)}"
            raise argparse.ArgumentError(action, message) from None
