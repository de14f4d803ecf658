"""Files and folders that are there whole or not at all, whatever ends the writer.

The one way to publish: write under a temporary name, sync the content, rename, sync the names.
`csrc/new_file.h` does the same for plans, and `csrc/token_file_builder.h` for corpora.
"""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Mark in the name of a file while it is written, before random digits; as in csrc/new_file.cc.
TEMPORARY_MARK = ".tmp."
_UNFINISHED_SUFFIX = ".unfinished"


def publish_text(path: Path, content: str) -> None:
    """Write a small file in UTF-8 as `publish_bytes` does."""
    publish_bytes(path, content.encode())


def publish_bytes(path: Path, content: bytes) -> None:
    """Write a small file durably under its name, replacing what is there."""
    with publishing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Yield a name to write a file under; the block's normal end publishes it, an error removes it.

    The folder must exist, and the file be closed at the block's end. The temporary name is unique,
    so several processes on several machines may publish the same file at the same time: the last
    rename wins. OSError, naming the file, where the file system refuses.
    """
    # Random rather than host and process number: containers on a shared file system share both.
    temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{os.urandom(8).hex()}")
    try:
        yield temporary
        sync(temporary)
        rename_durably(temporary, path)
    except OSError as error:
        # A full disk shows in a write, which knows no name.
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of `publishing(path)`; nobody may be publishing it now."""
    for temporary in path.parent.glob(f"{glob.escape(path.name)}{TEMPORARY_MARK}*"):
        temporary.unlink()


def begin_folder(folder: Path) -> Path:
    """Create `FOLDER.unfinished`, empty, and return it; what a killed process left there goes."""
    unfinished = unfinished_folder(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def publish_folder(folder: Path) -> None:
    """Give the folder that `begin_folder` created its name durably; its files are closed."""
    unfinished = unfinished_folder(folder)
    for path in [*unfinished.rglob("*"), unfinished]:
        sync(path)
    rename_durably(unfinished, folder)


def withdraw_folder(folder: Path) -> Path:
    """Take a folder's name away durably, before its files are removed; return the folder.

    The new name is that of an unfinished folder, so a half-removed one is never taken for whole.
    """
    unfinished = unfinished_folder(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    rename_durably(folder, unfinished)
    return unfinished


def remove_unfinished_folders(parent: Path) -> None:
    """Remove what killed processes left of `begin_folder` and `withdraw_folder` in a folder."""
    for path in parent.glob(f"*{_UNFINISHED_SUFFIX}"):
        shutil.rmtree(path)


def unfinished_folder(folder: Path) -> Path:
    """Return the name of a folder while it is written."""
    return folder.with_name(folder.name + _UNFINISHED_SUFFIX)


def is_unfinished(path: Path) -> bool:
    """Tell whether a folder has the name of one that is still written."""
    return path.suffix == _UNFINISHED_SUFFIX


def rename_durably(path: Path, new_path: Path) -> None:
    """Rename inside a folder, replacing a file that is there; the new name survives a crash.

    The content must be synced before: a name that is durable first would show an empty file.
    """
    path.replace(new_path)
    sync(new_path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
