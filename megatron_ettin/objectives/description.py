"""Objectives as plain values: for the ledger by class name, for YAML by the path of the class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ettin.objectives.base import Attention, Objective


@dataclass(frozen=True)
class Face:
    """Use of weights that were trained by several objectives at once: as one of them needs it."""

    attention: Attention
    prediction_shift: int
    objective: str
    """Class of the objective, by its module and name."""

    @classmethod
    def of(cls, objective: Objective) -> Face:
        """Return the use that an objective trains for."""
        return cls(objective.attention, objective.prediction_shift, class_path(objective))


def class_path(objective: Objective) -> str:
    """Return the module and name of an objective's class, by which a saved YAML file names it."""
    return f"{type(objective).__module__}.{type(objective).__qualname__}"


def describe(objective: Objective) -> dict[str, Any]:
    """Return the name of the class as `name`, then its settings (docs/ledger.md, section 6)."""
    return {"name": type(objective).__name__, **_settings(objective, describe)}


def read_description(description: dict[str, Any]) -> Objective:
    """Return the objective of what `describe` returned.

    Raises:
        KeyError, TypeError, ValueError: it names a class or a setting that does not exist.
    """
    kinds = {kind.__name__: kind for kind in _kinds(Objective)}
    fields = {name: _read(value) for name, value in description.items() if name != "name"}
    objective: Objective = kinds[description["name"]](**fields)
    return objective


def as_class(objective: Objective) -> dict[str, Any]:
    """Return `class_path` and `init_args`, as a run's YAML names an objective."""
    return {"class_path": class_path(objective), "init_args": _settings(objective, as_class)}


def _settings(
    objective: Objective, of_part: Callable[[Objective], dict[str, Any]]
) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Objective):
            return of_part(value)
        if isinstance(value, dict):
            return {name: plain(entry) for name, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value

    fields = dataclasses.fields(objective)
    return {field.name: plain(getattr(objective, field.name)) for field in fields}


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return [_read(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    # A phase may be called "name" too, but its entry is no text.
    if isinstance(value.get("name"), str):
        return read_description(value)
    return {name: _read(entry) for name, entry in value.items()}


def _kinds(kind: type) -> Iterator[type]:
    below: type
    for below in kind.__subclasses__():
        yield below
        yield from _kinds(below)
