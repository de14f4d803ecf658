"""Preprocess onto a disk with too little room, for many sizes of it; prints what each run left.

A program of its own, because the disk is mounted for it alone:

    unshare -rm sh -c 'mount -t tmpfs -o size=4m tmpfs DISK && exec "$@"' sh \
        python -m tests.unit.fill_preprocessing TOKENIZER RAW DISK STEP
"""

import errno
import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from megatron_ettin.data.encoding import SelectionRules
from megatron_ettin.data.preprocess import preprocess
from megatron_ettin.data.preprocess_options import PreprocessOptions
from megatron_ettin.data.raw_files import expand_inputs

#: Files that hold times.
TIMED = (".identity.json", ".inputs.json")


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file by its relative name, without those that hold times."""
    paths = [path for path in folder.glob("**/*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if not path.name.endswith(TIMED)
    }


def fill(disk: Path, free_bytes: int) -> Path:
    """Leave so many bytes on the disk; return the file that fills it."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        stat = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - free_bytes)
    return ballast


def main(tokenizer: str, raw: str, disk: str, step: str) -> None:
    """Print a line for each amount of room in steps, until a run fits."""
    out = Path(disk) / "out"
    options = PreprocessOptions(
        inputs=expand_inputs([raw]),
        output_prefix=out / "c",
        tokenizer=Path(tokenizer),
        shards=True,
        rules=SelectionRules(validation_share=0.1),
    )
    fresh = replace(options, output_prefix=Path(disk) / "fresh" / "c")
    preprocess(fresh)
    expected = digests(Path(disk) / "fresh")
    shutil.rmtree(Path(disk) / "fresh")
    free_bytes, fits = 0, False
    while not fits:
        ballast = fill(Path(disk), free_bytes)
        message, number = "", None
        try:
            preprocess(options)
            fits = True
        except OSError as error:
            message, number = str(error), error.errno
        left = digests(out)
        ballast.unlink()
        preprocess(options)
        result = {
            "free_bytes": free_bytes,
            "message": message,
            "errno": None if number is None else errno.errorcode[number],
            "left": [name for name in left if left[name] == expected.get(name)],
            "other": [name for name in left if left[name] != expected.get(name)],
            "same": digests(out) == expected,
        }
        print(json.dumps(result), flush=True)
        shutil.rmtree(out)
        free_bytes += int(step)


if __name__ == "__main__":
    main(*sys.argv[1:])
