"""Inputs of a command: files, globs, URLs, folders of data sets, and lists of all these."""

import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ettin.data.storage import (
    RawFile,
    file_name,
    is_url,
    join,
    look_up,
    matches,
    parent,
    read_content,
)

LIST_MARK = "@"
"""Sign before the name of a file that lists inputs."""


def expand_inputs(patterns: Sequence[str]) -> tuple[RawFile, ...]:
    """Return the files that the patterns name: in the order given, each glob sorted.

    A pattern is a file, a glob, a folder that `datasets` saved or that holds MDS shards, or
    `@FILE`, a list of these; each of them a local path or a URL.

    FileNotFoundError where a file is missing or a glob matches nothing; ValueError for another
    folder, a suffix that no reader knows, a shard that is not as long as its index says, or a file
    named twice (its documents would count twice). OSError where a store cannot be reached.
    """
    files: list[RawFile] = []
    known: set[str] = set()
    for pattern in _listed(patterns):
        for file in _expand(pattern):
            place = file.path if is_url(file.path) else os.path.abspath(file.path)
            if place in known:
                raise ValueError(f"{file.path}: given twice; its documents would be counted twice")
            known.add(place)
            files.append(file)
    if not files:
        raise ValueError(f"no input: {', '.join(patterns) or 'none was named'}")
    return tuple(files)


def _listed(patterns: Sequence[str]) -> Iterator[str]:
    """Yield the patterns, with the lines of a list in its place."""
    for pattern in patterns:
        if not pattern.startswith(LIST_MARK):
            yield pattern
            continue
        path = pattern.removeprefix(LIST_MARK)
        try:
            lines = read_content(path).decode().removeprefix("\ufeff").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: invalid UTF-8 at byte {error.start + 1}") from None
        for number, line in enumerate(lines, 1):
            line = line.strip()
            if line.startswith(LIST_MARK):
                raise ValueError(f"{path}:{number}: {line}: a list in a list; name its files here")
            if line and not line.startswith("#"):
                yield join(parent(path), line)


def _expand(pattern: str) -> list[RawFile]:
    kind, size = look_up(pattern)
    if kind is None and glob.has_magic(pattern):
        names = matches(pattern)
        if not names:
            raise FileNotFoundError(f"no file matches {pattern!r}")
        found = [file for name in names for file in _named(name, *look_up(name))]
    else:
        found = _named(pattern, kind, size)
    return found


def _named(name: str, kind: str | None, size: int) -> list[RawFile]:
    """Return the files behind the name of a file or folder."""
    path = name if is_url(name) else str(Path(name))
    if kind is None:
        raise FileNotFoundError(f"no such file: {path}")
    if kind == "folder":
        return _files_of_folder(path)
    file = RawFile(path, size)
    _ = file.format
    return [file]


def _files_of_folder(folder: str) -> list[RawFile]:
    for name, reader in FOLDERS.items():
        path = join(folder, name)
        if look_up(path)[0] != "file":
            continue
        try:
            return reader(folder, json.loads(read_content(path)))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: is not what its name says: {type(error).__name__}: {error}"
            ) from error
    raise ValueError(
        f"{folder}: is a folder; name its files or a glob such as '{join(folder, '*.jsonl')}'"
    )


def _refuse_splits(folder: str, content: Any) -> list[RawFile]:
    splits = [join(folder, name) for name in content["splits"]]
    raise ValueError(f"{folder}: holds several splits; name one or more: {', '.join(splits)}")


def _saved_shards(folder: str, content: Any) -> list[RawFile]:
    """Return the files of a folder that `datasets` saved, in its order."""
    return [_shard(folder, entry["filename"], None) for entry in content["_data_files"]]


def _mosaic_shards(folder: str, content: Any) -> list[RawFile]:
    """Return the shards of a folder of MDS shards, in the order of its index; unpacked ones first.

    Both forms of a shard hold the same samples.
    """
    files = []
    for number, shard in enumerate(content["shards"]):
        if shard["format"] != "mds":
            raise ValueError(f"{folder}: shard {number} has the format {shard['format']}, not mds")
        forms = [form for form in (shard["raw_data"], shard.get("zip_data")) if form]
        there = [f for f in forms if look_up(join(folder, f["basename"]))[0] == "file"]
        form = (there or forms[-1:])[0]
        files.append(_shard(folder, form["basename"], form["bytes"]))
    return files


def _shard(folder: str, name: str, size: int | None) -> RawFile:
    path = join(folder, name)
    kind, now = look_up(path)
    if kind != "file":
        raise FileNotFoundError(f"no such file: {path}; the index of {folder} names it")
    if size not in (None, now):
        raise ValueError(
            f"{path}: truncated or damaged: has {now} bytes, and the index of {folder} says {size};"
            " copy or download it again"
        )
    file = RawFile(path, now)
    if not file_name(path).lower().endswith((".arrow", ".mds", ".mds.gz", ".mds.zst", ".mds.zstd")):
        raise ValueError(f"{path}: packed in a way that no reader knows; known are gz and zstd")
    return file


FOLDERS: dict[str, Callable[[str, Any], list[RawFile]]] = {
    "dataset_dict.json": _refuse_splits,
    "state.json": _saved_shards,
    "index.json": _mosaic_shards,
}
"""Files that tell what a folder is, and the readers of their content."""
