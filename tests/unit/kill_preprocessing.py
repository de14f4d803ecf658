"""Kill processes that preprocess, and check what each leaves; prints the sets of names seen.

A program of its own, because it forks: a test process may have threads. What reads or writes a
corpus runs in a child, so that this process has none.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_ettin.data.encoding import SelectionRules
from megatron_ettin.data.preprocess import preprocess
from megatron_ettin.data.preprocess_options import PreprocessOptions
from megatron_ettin.data.provenance import Provenance
from megatron_ettin.data.raw_files import expand_inputs
from megatron_ettin.native import TokenFile

KILLS = 15


def rewrite_until_killed(options: list[PreprocessOptions], ready: int) -> None:
    """Make two corpora of one name in turn."""
    for turn in range(10_000):
        preprocess(options[turn % 2])
        if turn == 1:
            os.write(ready, b"1")


def check(prefix: Path) -> None:
    """Check that an index has the sidecar and the tokens of the same input."""
    if not Path(f"{prefix}.idx").exists():
        return
    file = TokenFile(prefix)
    with Provenance.open(prefix) as provenance:
        table = provenance.documents(file.lengths.argsort().astype("i8"))
        assert provenance.num_documents == file.num_documents
    assert table["n_tokens"].to_pylist() == sorted(file.lengths.tolist())
    (shard,) = set(table["shard"].to_pylist())
    assert all(name.startswith(Path(shard).stem) for name in table["id"].to_pylist())


def in_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def main(tokenizer: Path, inputs: list[Path], prefix: Path) -> None:
    chance = random.Random(0)
    options = [
        PreprocessOptions(
            inputs=expand_inputs([str(path)]),
            output_prefix=prefix,
            tokenizer=tokenizer,
            rules=SelectionRules(validation_share=0.2),
        )
        for path in inputs
    ]
    prefixes = [options[0].corpus("text", part) for part in ("document", "validation")]
    for _ in range(KILLS):
        readable, writable = os.pipe()
        child = in_child(lambda ready=writable: rewrite_until_killed(options, ready))
        os.close(writable)
        assert os.read(readable, 1) == b"1", "the writer failed"
        time.sleep(chance.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(readable)
        print(*sorted(path.name for path in prefix.parent.iterdir()))
        for each in prefixes:
            _, status = os.waitpid(in_child(lambda path=each: check(path)), 0)
            assert status == 0, f"{each} is not whole"


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(sys.argv[2]), Path(sys.argv[3])], Path(sys.argv[4]))
