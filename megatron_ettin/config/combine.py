"""Combination of files and command line by name: sections, entries of mappings, phases.

jsonargparse alone does three things silently: it replaces a mapping by that of the next file, lets
`--phases.train_tokens` change only the last phase, and accepts an unknown name with an empty
mapping.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Collection, Sequence
from typing import Any

import jsonargparse
import yaml

from megatron_ettin.command_parser import check_options, nearest
from megatron_ettin.config.data import PhaseConfig
from megatron_ettin.objectives import Objective

#: Mappings to which a further file adds entries; an entry replaces an earlier one of its name.
MERGED = ("data.sources", "data.blend", "data.pools", "model.megatron_overrides")
PHASES = "--phases."


class ConfigFile(jsonargparse.ActionConfigFile):  # type: ignore[name-defined, misc]
    """The option `--config`: checks the names in a file, and merges its mappings by name."""

    def __init__(self, *, sections: type, **options: Any) -> None:
        """Take the dataclass with the sections of a file as its fields."""
        super().__init__(**options)
        self._sections = sections

    def __call__(
        self,
        parser: jsonargparse.ArgumentParser,
        cfg: jsonargparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Merge the file `values` into `cfg`; a ValueError names an unknown section."""
        check_names(values, self._sections, others=vars(cfg))
        earlier = {name: cfg.get(name) for name in MERGED}
        super().__call__(parser, cfg, values, option_string)
        for name, entries in earlier.items():
            if isinstance(entries, dict) and isinstance(cfg.get(name), dict):
                cfg[name] = {**entries, **cfg[name]}


def check_names(path: str, sections: type, *, others: Collection[str] = ()) -> None:
    """Raise ValueError if the file `path` has a name that is no field of `sections`.

    The file may have `others` as names at the top too. A file that is unreadable or no mapping is
    left to jsonargparse, whose error names file and field.
    """
    try:
        with open(path, encoding="utf-8") as file:
            document = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError):
        return
    _check(document, sections, where=f"{path}: ", others=others)


def _check(document: Any, hint: Any, *, where: str, others: Collection[str] = ()) -> None:
    """Compare the names in `document` with the fields of the dataclasses in `hint`."""
    if dataclasses.is_dataclass(hint):
        # The fields of an objective depend on the class that the file chooses: jsonargparse checks
        # them.
        if isinstance(document, dict) and hint is not Objective:
            _check_fields(document, hint, where=where, others=others)
    elif typing.get_origin(hint) is dict:
        entries = document.items() if isinstance(document, dict) else ()
        for name, value in entries:
            _check(value, typing.get_args(hint)[1], where=f"{where}{name}.")
    elif typing.get_origin(hint) is list:
        for index, value in enumerate(document if isinstance(document, list) else ()):
            _check(value, typing.get_args(hint)[0], where=f"{where}{index}.")
    else:
        for alternative in typing.get_args(hint):
            _check(document, alternative, where=where)


def _check_fields(
    document: dict[Any, Any], section: Any, *, where: str, others: Collection[str]
) -> None:
    hints = typing.get_type_hints(section)
    known = {field.name for field in dataclasses.fields(section)} | set(others)
    for name, value in document.items():
        field = str(name).removesuffix("+")  # `phases+:` appends
        if field not in known:
            raise ValueError(f"{where}{name}: no such name; {_suggestion(field, known)}")
        if field in hints:
            _check(value, hints[field], where=f"{where}{name}.")


def _suggestion(name: str, known: Collection[str]) -> str:
    near = nearest(name, known)
    return f"did you mean {near}?" if near else f"there are {', '.join(sorted(known))}"


def with_phases_by_name(parser: jsonargparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """Return `arguments` with each `--phases.NAME.FIELD VALUE` carried out.

    These options apply after all others, in any position: they become one last `--phases`. If
    there is one phase only, `--phases.FIELD VALUE` means that phase.

    Raises:
        ValueError: no such option; no phase has the name, or no name is given where there are
            several phases; no such field, or a value of another type.
    """
    check_options(arguments, parser)
    changes, others = _split(arguments)
    if not changes:
        return list(arguments)
    # This first parse must neither print nor exit.
    quiet = [argument for argument in others if not argument.startswith("--print_config")]
    given = parser.parse_args(quiet).phases or []
    phases = {phase.name: phase.as_dict() for phase in given}
    options: dict[str, list[str]] = {}
    for option, value in changes:
        name, _, field = option.removeprefix(PHASES).rpartition(".")
        if not name and len(phases) == 1:
            name = next(iter(phases))
        if name not in phases:
            reason = f"no phase is called {name!r}" if name else "does not say which phase is meant"
            remedy = " or ".join(f"{PHASES}{known}.{field}" for known in phases)
            raise ValueError(f"{option}: {reason}; give {remedy or 'a file with phases first'}")
        options.setdefault(name, []).append(f"--{field}={value}")
    for name, fields in options.items():
        one = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
        one.add_class_arguments(PhaseConfig)
        one.set_defaults(phases[name])
        try:
            phases[name] = one.parse_args(fields).as_dict()
        except jsonargparse.ArgumentError as error:
            raise ValueError(f"{PHASES}{name}: {error}") from error
    return [*others, f"--phases={json.dumps(list(phases.values()))}"]


def _split(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the (option, value) pairs of options that begin with `--phases.`, and the rest."""
    changes, others = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith(PHASES) or argument == f"{PHASES}help":
            others.append(argument)
            continue
        option, has_value, value = argument.partition("=")
        changes.append((option, value if has_value else next(remaining, "")))
    return changes, others
