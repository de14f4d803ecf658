"""Tasks read from a YAML file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection
from pathlib import Path

import jsonargparse

from megatron_ettin.evaluation import tasks
from megatron_ettin.evaluation.tasks.task import Task


def read_tasks(
    path: Path, only: Collection[str] = (), *, without: Collection[str] = ()
) -> dict[str, Task]:
    """Read the tasks that a YAML file names below `tasks:`: those of `only`, or all but `without`.

    Raises:
        ValueError: the file is no such YAML, a task's class or field is unknown, or a name of
            `only` or `without` is not in the file.
    """
    # A class can be named in YAML once its module is imported. The modules import the heavy
    # libraries of their tasks only when they measure.
    for module in pkgutil.iter_modules(tasks.__path__):
        importlib.import_module(f"{tasks.__name__}.{module.name}")
    jsonargparse.set_parsing_settings(
        subclasses_enabled=[Task], docstring_parse_attribute_docstrings=True
    )
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--tasks", type=dict[str, Task], required=True)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; examples/evaluation/ has examples")
    try:
        named: dict[str, Task] = parser.instantiate(parser.parse_path(str(path))).tasks
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if unknown := sorted({*only, *without} - set(named)):
        raise ValueError(f"{path}: no task {', '.join(unknown)}; it has {', '.join(named)}")
    return {
        name: task
        for name, task in named.items()
        if (not only or name in only) and name not in without
    }
