"""Files that are there whole or not at all, whatever ends the writer."""

import os
import secrets
from pathlib import Path


def publish_text(path: Path, content: str) -> None:
    """Write a small file in UTF-8 as `publish_bytes` does."""
    publish_bytes(path, content.encode())


def publish_bytes(path: Path, content: bytes) -> None:
    """Write a small file durably under its name; the folder must exist.

    The temporary name is unique, so several processes on several machines may publish the same
    file at the same time: the last rename wins. OSError where the file system refuses.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        publish_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish_file(temporary: Path, path: Path) -> None:
    """Give a written and closed file its final name durably, replacing what is there.

    Both names must be in the same folder. OSError where the file system refuses.
    """
    _fsync(temporary)
    temporary.replace(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
