"""Files that are there whole or not at all, whatever ends the writer."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    rename wins. OSError where the file system refuses.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def publish_folder(unfinished: Path, folder: Path) -> None:
    """Give a folder of closed files its final name durably; both names are in the same folder."""
    for path in [*unfinished.iterdir(), unfinished]:
        sync(path)
    unfinished.rename(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
