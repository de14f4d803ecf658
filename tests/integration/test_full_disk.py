"""A disk that is full while a run writes its ledger and metrics: nothing is lost in the end."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_ettin.order.ledger import Kind
from megatron_ettin.order.row_losses import RowLossReader, RowState
from megatron_ettin.order.run_folder import RunFolder
from tests.conftest import TinyCorpus

ROOT = Path(__file__).parents[2]
SECONDS = 240.0


def can_mount() -> bool:
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return False
    mounts = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(mounts, capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_mount(), reason="needs the right to mount"),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[list[str], Path, Path]]:
    """Mount a disk of 24 MiB that only some processes see.

    Gives the words before a command of such a process, the disk's path for it, and for the test.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = 'mount -t tmpfs -o size=24m none "$0" && echo && exec sleep infinity'
    holder = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", "-m", "sh", "-c", mount, str(folder)],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        with holder.stdout as output:
            output.readline()
        enter = ["nsenter", "-t", str(holder.pid), "--mount", "--"]
        yield enter, folder, Path(f"/proc/{holder.pid}/root{folder}")
    finally:
        holder.kill()
        holder.wait()


def wait(condition: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.02)


def test_a_run_goes_on_while_the_disk_is_full(
    disk: tuple[list[str], Path, Path], tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    enter, inside, outside = disk
    phase = {"name": "short", "train_tokens": 250_000, "seq_length": 128, "global_batch_size": 16}
    logging = {"log_every_steps": 1, "row_losses": True}
    config = tiny_corpus.write_config(
        tmp_path / "run.yaml", objective="MaskedLM", phases=[phase], logging=logging
    )
    run, log = RunFolder(outside / "run"), tmp_path / "log"
    command = [sys.executable, "-m", "megatron_ettin.pretrain", f"--config={config}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*enter, *command, f"--run_dir={inside / 'run'}"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait(lambda: len(run.metrics_lines()) > 1, process, log)
        with suppress(OSError), (outside / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        message = "run/metrics.jsonl: cannot be written (No space left on device)"
        wait(lambda: message in log.read_text(), process, log)
        written, said = run.metrics.read_bytes(), log.read_text().count(" · loss ")
        wait(lambda: log.read_text().count(" · loss ") > said + 4, process, log)
        assert run.metrics.read_bytes() == written
        assert written.endswith(b"\n"), "no line is there in part"
        (outside / "filler").unlink()
        wait(lambda: "metrics.jsonl: written again" in log.read_text(), process, log)
        assert process.wait(SECONDS) == 0, log.read_text()[-4000:]
    finally:
        process.kill()
        process.wait()
    steps = [line["step"] for line in run.read_metrics() if line["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    assert log.read_text().count(message) == 1, "it is said once a minute"
    records = run.read_ledger().records
    assert (records["kind"] == Kind.STEP).sum() == len(steps)
    assert records["kind"][-1] == Kind.END
    assert run.newest_checkpoint() == run.checkpoint(len(steps))
    end_g = int(records["g_end"][-1])
    states = RowLossReader.open(run.row_losses).read(0, end_g).states
    assert (states == RowState.TRAINED).all()
