"""Kill runs that make a dataset of many shards, until enough were; prints where each kill struck.

A program of its own, because it forks: a test process may have threads.

    python -m tests.unit.kill_shards TOKENIZER RAW FOLDER KILLS WORKERS
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

from megatron_ettin.data import preprocess as module
from megatron_ettin.data.encoding import SelectionRules
from megatron_ettin.data.preprocess import preprocess
from megatron_ettin.data.preprocess_options import PreprocessOptions
from megatron_ettin.data.raw_files import expand_inputs

TIMED = (".identity.json", ".inputs.json")
#: Seconds after which a run is killed, at most: from its start, or from its first file on.
LONGEST_START, LONGEST_WRITING = 3.0, 0.3


def files_in(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.glob("**/*") if path.is_file()]
    kept = [path for path in paths if not path.name.endswith(TIMED)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}


def start(options: PreprocessOptions) -> int:
    """Fork a process that makes the dataset; return its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            module.MIN_BYTES_PER_WORKER = 1
            preprocess(options)
            status = 0
        finally:
            os._exit(status)
    return child


def wait_for_a_moment(child: int, folder: Path, chance: random.Random) -> tuple[int, int]:
    """Wait until the run is somewhere on its way; return what `waitpid` says of it."""
    if chance.random() < 0.3:
        time.sleep(chance.uniform(0, LONGEST_START))
        return os.waitpid(child, os.WNOHANG)
    while not list(folder.glob("**/*.tmp")):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return done, status
        time.sleep(0.002)
    time.sleep(chance.uniform(0, LONGEST_WRITING))
    return os.waitpid(child, os.WNOHANG)


def kill_one_of(child: int, chance: random.Random) -> str:
    """Kill the run or, half of the time, one of its workers; wait until all of it is gone."""
    family = psutil.Process(child).children(recursive=True)
    victim = chance.choice(family).pid if family and chance.random() < 0.5 else child
    os.kill(victim, signal.SIGKILL)
    os.waitpid(child, 0)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, f"still running after {victim} was killed: {alive}"
    return "run" if victim == child else "worker"


def main(tokenizer: Path, raw: str, folder: Path, kills: int, workers: int) -> None:
    chance = random.Random(workers)
    options = PreprocessOptions(
        inputs=expand_inputs([raw]), output_prefix=folder / "quiet" / "c", tokenizer=tokenizer,
        rules=SelectionRules(validation_share=0.1), shards=True, deduplicate="exact",
    )  # fmt: skip
    _, status = os.waitpid(start(options), 0)
    assert status == 0
    expected = files_in(folder / "quiet")
    options = PreprocessOptions(
        **{**vars(options), "output_prefix": folder / "killed" / "c", "workers": workers}
    )
    while kills > 0:
        child = start(options)
        done, status = wait_for_a_moment(child, folder / "killed", chance)
        if not done:
            struck = kill_one_of(child, chance)
            kills -= 1
            left = {path.suffix for path in (folder / "killed").glob("**/*") if path.is_file()}
            print(struck, *sorted(left), flush=True)
            continue
        assert status == 0
        assert files_in(folder / "killed") == expected
        shutil.rmtree(folder / "killed")
    _, status = os.waitpid(start(options), 0)
    assert status == 0
    assert files_in(folder / "killed") == expected


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
