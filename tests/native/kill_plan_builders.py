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
SMALL = 2_000  # documents of a plan that is published as soon as it is begun


def build(file: native.TokenFile, path: Path, documents: int) -> None:
    native.build_row_plan(
        file,
        path,
        first_document=0,
        end_document=documents,
        seq_length=64,
        pack="bfd",
        specials="add",
        min_doc_tokens=1,
        max_segments_per_row=4,
        block_documents=5_000,
        threads=3,
    )


def build_again_and_again(file: native.TokenFile, path: Path, documents: int, ready: int) -> None:
    os.write(ready, b"1")
    for _ in range(10_000):
        build(file, path, documents)
        path.unlink()


def expect(file: native.TokenFile, path: Path, documents: int) -> tuple[bytes, float]:
    """Return the bytes of an undisturbed plan and the seconds that it takes."""
    begin = time.monotonic()
    build(file, path, documents)
    duration = time.monotonic() - begin
    content = path.read_bytes()
    path.unlink()
    return content, duration


def main(prefix: Path, path: Path) -> None:
    file = native.TokenFile(prefix)
    sizes = (SMALL, file.num_documents)
    expected = {documents: expect(file, path, documents) for documents in sizes}
    chance = random.Random(0)
    for turn in range(KILLS):
        documents = sizes[turn % 2]  # killed while publishing, killed while packing
        content, duration = expected[documents]
        path.unlink(missing_ok=True)
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                build_again_and_again(file, path, documents, writable)
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
            assert path.read_bytes() == content
        # What the killed one left is in nobody's way, and goes with the next build.
        build(file, path, documents)
        assert path.read_bytes() == content
        assert [p.name for p in path.parent.iterdir()] == [path.name]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
