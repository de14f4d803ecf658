"""Kill processes that build a plan, and check what each leaves; prints the sets of names seen.

A program of its own, because it forks: a test process may have threads.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from megatron_ettin import native

KILLS = 60


def build(file: native.TokenFile, path: Path) -> None:
    native.build_row_plan(
        file,
        path,
        first_document=0,
        end_document=file.num_documents,
        seq_length=64,
        pack="bfd",
        specials="add",
        min_doc_tokens=1,
        max_segments_per_row=4,
        block_documents=5_000,
        threads=3,
    )


def build_again_and_again(file: native.TokenFile, path: Path, ready: int) -> None:
    os.write(ready, b"1")
    for _ in range(1000):
        build(file, path)
        path.unlink()


def main(prefix: Path, path: Path) -> None:
    file = native.TokenFile(prefix)
    build(file, path)
    expected = path.read_bytes()
    begin = time.monotonic()
    for _ in range(3):
        path.unlink()
        build(file, path)
    duration = (time.monotonic() - begin) / 3
    chance = random.Random(0)
    for _ in range(KILLS):
        path.unlink(missing_ok=True)
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                build_again_and_again(file, path, writable)
            finally:
                os._exit(1)
        os.close(writable)
        assert os.read(readable, 1) == b"1"
        time.sleep(chance.uniform(0, 3 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(readable)
        names = sorted(p.name for p in path.parent.iterdir())
        print(*(name if ".tmp." not in name else name[: name.index(".tmp.") + 4] for name in names))
        if path.exists():
            assert path.read_bytes() == expected
        # What the killed one left is in nobody's way, and goes with the next build.
        build(file, path)
        assert path.read_bytes() == expected
        assert [p.name for p in path.parent.iterdir()] == [path.name]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
