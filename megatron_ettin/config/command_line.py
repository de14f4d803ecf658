"""RunConfig: read from YAML files and a command line, and written as YAML."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from megatron_ettin.command_parser import HelpFirst, hint
from megatron_ettin.config.combine import ConfigFile, check_names, with_phases_by_name
from megatron_ettin.config.run import RunConfig
from megatron_ettin.objectives import Objective, as_class

CONFIG_HELP = (
    "YAML file; repeat the option for more files. A later file overrides the fields that it names; "
    "data.sources, data.blend, data.pools and model.megatron_overrides are merged by entry."
)


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the field, and the file if there is one."""


class RunParser(HelpFirst, jsonargparse.ArgumentParser):  # type: ignore[misc]
    """Parser of a run's fields."""


def parser_of(sections: type, **options: Any) -> RunParser:
    """Return a parser of files with the fields of a dataclass; `options` are argparse's."""
    jsonargparse.set_parsing_settings(
        subclasses_enabled=[Objective], docstring_parse_attribute_docstrings=True
    )
    parser = RunParser(exit_on_error=False, **options)
    parser.add_argument("--config", action=ConfigFile, sections=sections, help=CONFIG_HELP)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> RunConfig:
    """Return the run that the command line describes (`--help` exits).

    Raises:
        ConfigError: naming the field that is unknown, of the wrong type, or contradicts another.
    """
    parser = _parser()
    try:
        arguments = with_phases_by_name(parser, sys.argv[1:] if argv is None else argv)
        return _instantiate(parser, parser.parse_args(arguments))
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise ConfigError(with_nearest_value(str(error))) from error


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back identically."""
    values = dataclasses.asdict(config)
    values["objective"] = as_class(config.objective)
    return yaml.safe_dump(values, sort_keys=False)


def load_config(path: Path) -> RunConfig:
    """Read a configuration that `to_yaml` wrote.

    Raises:
        ConfigError: naming the file and the field.
    """
    parser = _parser()
    try:
        check_names(str(path), RunConfig)
        return _instantiate(parser, parser.parse_path(str(path)))
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        message = str(error)
        raise ConfigError(message if str(path) in message else f"{path}: {message}") from error


@functools.cache  # building it from all docstrings takes 60 ms, and parsing does not change it
def _parser() -> jsonargparse.ArgumentParser:
    parser = parser_of(
        RunConfig,
        prog="python -m megatron_ettin.pretrain",
        usage="%(prog)s --config FILE [--config FILE ...] [--SECTION.FIELD VALUE ...]",
        description="Pre-train an Ettin encoder or decoder.",
    )
    parser.add_class_arguments(RunConfig)
    return parser


def with_nearest_value(message: str) -> str:
    """Append the nearest value to jsonargparse's message about a field with a few values."""
    literal = re.search(r"Literal\[(.+?)\]\. Got value: (\S+)", message)
    if literal is not None:
        return message + hint(literal[2], re.findall(r"'([^']+)'", literal[1]))
    objective = re.search(r"Expected a dot import path string: (\w+)", message)
    if objective is not None:
        return message + hint(objective[1], _class_names(Objective))
    return message


def _class_names(base: type) -> list[str]:
    """Return the names of all classes that are made of a class, itself left out."""
    made: list[type] = base.__subclasses__()
    return [name for each in made for name in (each.__name__, *_class_names(each))]


def _instantiate(parser: jsonargparse.ArgumentParser, parsed: jsonargparse.Namespace) -> RunConfig:
    sections = vars(parser.instantiate(parsed))
    sections.pop("config")
    return RunConfig(**sections)
