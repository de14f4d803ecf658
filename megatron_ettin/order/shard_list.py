"""The shards of a corpus, from what the configuration names: a pair, several pairs, or a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

#: File of a folder of shards that names all of them; tools/preprocess_data.py writes it last.
DATASET_FILE = "dataset.json"
_REMEDY = "run tools/preprocess_data.py again to finish it"


def list_shards(prefix: str | Sequence[str]) -> list[str]:
    """Return the prefixes of the shards of a corpus, in the order of their documents.

    A name P is a folder of shards if there is no P.idx and P/ is there: its shards are all P/*.idx
    by name. Every other name is the prefix of one pair, be it there or not.

    Raises:
        ValueError: naming a folder that is not complete, a shard that is named twice, or no shard.
        OSError: a folder cannot be read.
    """
    names = [prefix] if isinstance(prefix, str) else prefix
    shards = [shard for name in names for shard in _shards_of(name)]
    if not shards:
        raise ValueError("prefix: an empty list; name the .bin/.idx pairs of the corpus")
    seen: set[str] = set()
    for shard in shards:
        if shard in seen:
            raise ValueError(f"{shard}: is named twice in one corpus; name each shard once")
        seen.add(shard)
    return shards


def plans_folder(prefix: str | Sequence[str]) -> Path:
    """Return the folder of a corpus's plans: beside its first pair, or its folder of shards."""
    first = prefix if isinstance(prefix, str) else prefix[0]
    return Path(f"{_without_slash(first)}.plans")


def _shards_of(name: str) -> list[str]:
    folder = Path(_without_slash(name))
    if Path(f"{folder}.idx").exists() or not folder.is_dir():
        return [name]
    there = {path.stem for path in folder.glob("*.idx")}
    listed = _read_names(folder / DATASET_FILE)
    if listed is None:
        _refuse_unfinished(folder)
    elif there != set(listed):
        _refuse_others(folder, listed, there)
    if not there:
        raise ValueError(f"{folder}: a folder without shards (*.idx); name another prefix")
    return [f"{_without_slash(name)}/{stem}" for stem in sorted(there)]


def _without_slash(name: str) -> str:
    return name.rstrip("/") or name


def _read_names(path: Path) -> list[str] | None:
    """Return the names of the shards that a folder must have; None if no file lists them."""
    try:
        shards = json.loads(path.read_bytes())["shards"]
        return [os.fspath(shard["name"]) for shard in shards]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: does not list the names of its shards ({error}); {_REMEDY}"
        ) from error


def _refuse_unfinished(folder: Path) -> None:
    """Raise ValueError if a program has begun to write a shard, or was ended while it did."""
    # tools/preprocess_data.py writes *.inputs.json for each of its shards.
    begun = [*folder.glob("*.tmp"), *folder.glob("*.inputs.json")]
    for path in sorted([*begun, *folder.glob("*.bin")]):
        if path.suffix != ".bin":
            raise ValueError(f"{path}: belongs to a preprocessing that is not finished; {_REMEDY}")
        if not path.with_suffix(".idx").exists():
            raise ValueError(f"{path}: has no .idx: its shard is not finished; {_REMEDY}")


def _refuse_others(folder: Path, listed: Sequence[str], there: set[str]) -> None:
    missing, more = sorted(set(listed) - there), sorted(there - set(listed))
    if missing:
        raise ValueError(
            f"{folder}/{missing[0]}.idx: no such file, but {DATASET_FILE} lists the shard; restore "
            f"it, or {_REMEDY}"
        )
    raise ValueError(
        f"{folder}/{more[0]}.idx: {DATASET_FILE} does not list this shard; remove it, or {_REMEDY}"
    )
