"""Files of a Hugging Face folder by tensor: one file, those of an index, or a set of shards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor, found as transformers finds it.

    `model.safetensors` comes first, then the files that `model.safetensors.index.json` names. Where
    there is neither, one complete set of shards `NAME-00001-of-0000N.safetensors` will do.

    Raises:
        ValueError: no weights, a file that is missing, damaged or of another set, or a tensor that
            is in two files.
    """
    whole = folder / WHOLE
    if whole.is_file():
        return dict.fromkeys(_names(whole), whole)
    index = folder / INDEX
    if index.is_file():
        return _indexed(folder, index)
    files: dict[str, Path] = {}
    for path in _shards(folder):
        for name in _names(path):
            if name in files:
                raise ValueError(
                    f"{folder}: tensor {name} is in {files[name].name} and in {path.name}; remove "
                    f"the file that does not belong to the model"
                )
            files[name] = path
    return files


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file; ValueError naming it where it is damaged or gone."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error


def _names(path: Path) -> list[str]:
    with open_tensors(path) as file:
        return list(file.keys())


def _indexed(folder: Path, index: Path) -> dict[str, Path]:
    """Return the tensors of the files that an index names; other files are no part of the model."""
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({str(file) for file in placed.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of safetensors files: {error!r}") from error
    files: dict[str, Path] = {}
    for shard in shards:
        path = folder / shard
        if path.parent != folder or not path.is_file():
            raise ValueError(f"{path}: missing, but {index.name} names it; copy the folder again")
        files |= {name: path for name in _names(path) if placed.get(name, shard) == shard}
    if lost := sorted(placed.keys() - files.keys()):
        raise ValueError(f"{index}: tensor {lost[0]} is not in {placed[lost[0]]}")
    return files


def _shards(folder: Path) -> list[Path]:
    matches = [match for path in folder.iterdir() if (match := SHARD.fullmatch(path.name))]
    sets = {(match["name"], int(match["count"])) for match in matches}
    if not sets:
        raise ValueError(
            f"{folder}: no {WHOLE} (pickled weights are not read: load them with transformers and "
            f"save them again)"
        )
    if len(sets) > 1:
        raise ValueError(
            f"{folder}: has shards of {len(sets)} sets, and no {INDEX} says which is the model; "
            f"copy the index, or remove the others"
        )
    ((name, count),) = sets
    paths = [
        folder / f"{name}-{part:05d}-of-{count:05d}.safetensors" for part in range(1, count + 1)
    ]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: missing; the model has {count} shards")
    return paths
