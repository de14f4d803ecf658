"""Whatever way a run ends: nothing of it is alive afterwards, its output ends, its code says so."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_ettin.order.run_folder import RunFolder, step_of
from tests.conftest import TinyCorpus

#: In the environment of all processes of a job, so that they are found whatever they are called.
MARK = "JOB_OF_THIS_TEST"
#: Longer than any of the jobs lives.
PHASES = [{"name": "short", "train_tokens": 20_000_000, "seq_length": 128, "global_batch_size": 16}]
#: Far above what a start takes here.
START_SECONDS = 240


@dataclass
class Job:
    """torchrun with its ranks, and a reader of their output as `| tee` is one."""

    ranks: int
    folder: Path
    corpus: TinyCorpus
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self) -> None:
        self.corpus_copy = self.folder / "corpus"
        subprocess.run(["cp", "-r", self.corpus.folder, self.corpus_copy], check=True)
        copy = TinyCorpus(self.corpus_copy, self.corpus.vocab_size)
        config = copy.write_config(self.folder / "run.yaml", phases=PHASES, objective="CausalLM")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--signals-to-handle", "SIGTERM,SIGUSR1", "--nproc-per-node", str(self.ranks)),
                *("-m", "megatron_ettin.pretrain"),
                *(f"--config={config}", f"--run_dir={self.folder / 'run'}"),
                "--checkpoint.save_every_tokens=4000",
            ],
            env={**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            self.output = output.read()

    def wait_for_a_checkpoint(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not list((self.folder / "run" / "checkpoints").glob("step_*/state.json")):
            assert self.process.poll() is None, "the job ended before its first checkpoint"
            assert time.monotonic() < deadline, "the job never saved"
            time.sleep(0.1)

    def alive(self) -> dict[int, str]:
        """Return the processes of the job that run, or are stopped, by id, with what they run."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            with suppress(OSError):
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    text = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(folder.name)] = text
        return found

    def rank(self, number: int) -> int:
        """Return the process id of a rank."""
        for pid in self.alive():
            with suppress(OSError):
                if f"\0RANK={number}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    return pid
        raise AssertionError(f"rank {number} is not alive")

    def wait_for_the_end(self, seconds: float) -> int:
        """Wait for torchrun, a second longer for the rest, then expect nothing and no reader."""
        code = self.process.wait(timeout=seconds)
        time.sleep(1.0)
        assert self.alive() == {}
        self.reader.join(timeout=0.1)
        assert not self.reader.is_alive(), "something holds the output open"
        return code


@pytest.fixture(scope="module")
def jobs(
    tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Job]]:
    """Start all jobs at the same time; return the one for a test once it has saved."""
    sizes = {
        "error": 2,
        "terminated torchrun": 2,
        "asked torchrun": 1,
        "terminated rank": 1,
        "killed rank": 1,
        "killed torchrun": 1,
    }
    started = {}
    for name, ranks in sizes.items():
        started[name] = Job(ranks, tmp_path_factory.mktemp("job"), tiny_corpus)
        started[name].start()

    def saved(name: str) -> Job:
        started[name].wait_for_a_checkpoint()
        return started[name]

    try:
        yield saved
    finally:
        for job in started.values():
            for pid in job.alive():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            job.process.wait()
            job.reader.join()


@pytest.mark.slow
def test_an_error_of_one_rank_ends_the_job(jobs: Callable[[str], Job]) -> None:
    job = jobs("error")
    path = job.corpus_copy / "alpha.bin"
    content = bytearray(path.read_bytes())
    content[: len(content) // 2 * 2] = (60_000).to_bytes(2, "little") * (len(content) // 2)
    with path.open("r+b") as file:  # the same file, which the ranks have mapped
        file.write(content)
    assert job.wait_for_the_end(60.0) == 1
    errors = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert errors
    assert len(set(errors)) == len(errors), "ranks that fail alike say it once"
    assert all("alpha.bin: document" in line for line in errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"),
    [("terminated torchrun", signal.SIGTERM), ("asked torchrun", signal.SIGUSR1)],
)
def test_a_signal_to_torchrun_saves_and_ends_the_job(
    name: str, number: signal.Signals, jobs: Callable[[str], Job]
) -> None:
    job = jobs(name)
    job.process.send_signal(number)
    assert job.wait_for_the_end(60.0) == 1
    (step,) = re.findall(rf"saved and ended at step (\d+): {number.name}", job.output)
    newest = RunFolder(job.folder / "run").newest_checkpoint()
    assert newest is not None
    assert step_of(newest) == int(step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"),
    [("terminated rank", signal.SIGTERM), ("killed rank", signal.SIGKILL)],
)
def test_a_signal_to_a_rank_ends_the_job_and_is_reported(
    name: str, number: signal.Signals, jobs: Callable[[str], Job]
) -> None:
    job = jobs(name)
    os.kill(job.rank(0), number)
    assert job.wait_for_the_end(60.0) == 1
    assert number.name in job.output
    # The rank that is terminated saves, and ends by itself.
    code = 143 if number == signal.SIGTERM else -number.value
    assert f"exitcode  : {code}" in job.output


@pytest.mark.slow
def test_a_killed_torchrun_takes_its_ranks_along_even_stopped_ones(
    jobs: Callable[[str], Job],
) -> None:
    job = jobs("killed torchrun")
    os.kill(job.rank(0), signal.SIGSTOP)
    job.process.kill()
    assert job.wait_for_the_end(10.0) == -signal.SIGKILL
