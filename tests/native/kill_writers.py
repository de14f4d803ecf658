"""Kill processes that publish corpora, and check what each leaves; prints the sets of names seen.

A program of its own, because it forks: a test process may have threads.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from megatron_ettin import native

KILLS = 40


def write(prefix: Path, turn: int) -> None:
    """Publish a pair and a companion whose content follows from one number."""
    builder = native.TokenFileBuilder(prefix, "uint16")
    for _ in range(5):
        builder.add(np.full(turn % 50 + 1, turn))
    Path(f"{prefix}.note.tmp").write_text(str(turn))
    builder.commit(f"{prefix}.note")


def rewrite_until_killed(prefix: Path, ready: int) -> None:
    for turn in range(1, 50_000):
        write(prefix, turn)
        if turn == 1:
            os.write(ready, b"1")


def check(prefix: Path) -> None:
    if not Path(f"{prefix}.idx").exists():
        return
    file = native.TokenFile(prefix)  # validates lengths, offsets and the size of the .bin
    turn = int(file.tokens(0)[0])
    expected = [[turn] * (turn % 50 + 1)] * 5
    assert [file.tokens(i).tolist() for i in range(file.num_documents)] == expected
    assert Path(f"{prefix}.note").read_text() == str(turn)


def main(prefix: Path) -> None:
    chance = random.Random(0)
    for _ in range(KILLS):
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                rewrite_until_killed(prefix, writable)
            finally:
                os._exit(1)
        os.close(writable)
        assert os.read(readable, 1) == b"1", "the writer failed"
        time.sleep(chance.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(readable)
        print(*sorted(path.name for path in prefix.parent.iterdir()))
        check(prefix)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
