"""Corpora behind a URL: made in a folder of this machine, shard by shard, and copied there.

The folder looks like the store. Small files are there; of each .bin, .idx and .docs.parquet there
is an empty place of the same size, which takes no room on the disk. So whatever is asked of a
corpus, such as which shards are complete, is asked of the folder.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from megatron_ettin.data.preprocess_options import PreprocessOptions
from megatron_ettin.data.storage import file_system, named_errors

#: Ends of files whose content is not needed again, in the order in which they are copied.
LARGE = (".bin", ".docs.parquet", ".idx")


@contextlib.contextmanager
def staged(options: PreprocessOptions) -> Iterator[PreprocessOptions]:
    """Yield the options with an output on this machine; the block's end removes it.

    Options whose output is on this machine already are yielded as they are. The folder is in
    $TMPDIR and holds one shard at a time for each worker.

    Raises:
        ValueError, OSError: naming a store that cannot be reached.
    """
    if options.store is None:
        yield options
        return
    with tempfile.TemporaryDirectory(prefix="preprocessing-") as folder:
        local = replace(options, output_prefix=Path(folder) / options.output_prefix)
        _mirror(options.store, str(options.output_prefix), Path(folder))
        try:
            yield local
        except ValueError as error:
            # The user knows the store and not the folder.
            raise type(error)(str(error).replace(folder, options.store)) from error


def store_files(options: PreprocessOptions, paths: Iterable[Path]) -> None:
    """Copy finished files to the store, small ones last; nothing if the output has no store.

    A store shows a file when it is whole. The .idx of a shard comes after its other large files,
    and the summary last, as on a disk.
    """
    if options.store is None:
        return
    there = [path for path in paths if path.is_file()]
    for path in sorted(there, key=lambda path: _rank(path.name)):
        url = _url(options, path)
        with named_errors(url):
            system, name = file_system(url)
            system.makedirs(name.rpartition("/")[0], exist_ok=True)
            system.put_file(str(path), name)
        if path.name.endswith(LARGE):
            _hollow(path, path.stat().st_size)


def remove_file(options: PreprocessOptions, path: Path) -> None:
    """Remove a file that may be there, in the store first."""
    if options.store is not None and path.is_file():
        url = _url(options, path)
        with named_errors(url):
            system, name = file_system(url)
            system.rm_file(name)
    path.unlink(missing_ok=True)


def _url(options: PreprocessOptions, path: Path) -> str:
    return f"{options.store}/{path.relative_to(options.output_prefix.parent).as_posix()}"


def _mirror(store: str, prefix: str, folder: Path) -> None:
    """Make the folder look like the store, as far as the names that begin with the prefix go."""
    with named_errors(store):
        system, root = file_system(store)
        system.invalidate_cache()
        try:
            found = system.find(root, detail=True)
        except FileNotFoundError:
            return
        for name, info in found.items():
            relative = name.removeprefix(root).lstrip("/")
            if not relative.startswith(prefix):
                continue
            path = folder / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.name.endswith(LARGE):
                _hollow(path, int(info["size"]))
            else:
                path.write_bytes(system.cat_file(name))


def _hollow(path: Path, size: int) -> None:
    """Put an empty place of a size where a file is, or is to be."""
    with path.open("wb") as file:
        os.truncate(file.fileno(), size)


def _rank(name: str) -> int:
    """Return the place of a file among those of a shard."""
    for rank, end in enumerate(LARGE):
        if name.endswith(end):
            return rank
    # The summary makes a shard complete.
    return len(LARGE) + (not name.endswith(".inputs.json"))
