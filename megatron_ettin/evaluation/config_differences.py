"""Differences between the configurations of runs, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from megatron_ettin.config import RunConfig, to_yaml

ABSENT = "-"
"""Value of a key that a run's configuration lacks: a phase or a source of other runs."""


class ConfigDifference(NamedTuple):
    """A key that differs, and its value in each run, as in YAML."""

    key: str
    values: tuple[str, ...]


def config_differences(configs: Sequence[RunConfig]) -> list[ConfigDifference]:
    """Return the keys that differ, in the order of the configuration, without `run_dir`."""
    flat = [dict(_flat(_named(yaml.safe_load(to_yaml(config))))) for config in configs]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = ((key, tuple(each.get(key, ABSENT) for each in flat)) for key in keys)
    return [ConfigDifference(*row) for row in rows if row[0] != "run_dir" and len(set(row[1])) > 1]


def _named(values: dict[str, Any]) -> dict[str, Any]:
    """Replace the list of phases by their names, and the objective's class by its own."""
    objective = values["objective"]
    name = objective["class_path"].rpartition(".")[2]
    phases = {phase.pop("name"): phase for phase in values["phases"]}
    return {**values, "phases": phases, "objective": {"": name, **objective["init_args"]}}


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{above}.{key}" if above and key else f"{above}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, name)
        else:
            yield name, _as_yaml(value)


def _as_yaml(value: Any) -> str:
    if isinstance(value, list | dict):
        return yaml.safe_dump(value, default_flow_style=True, width=1_000_000).strip()
    return value if isinstance(value, str) else yaml.safe_dump(value).splitlines()[0]
