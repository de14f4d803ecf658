"""Report of the hosts at the start: what it says, and what of two hosts may not differ."""

import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_ettin import distributed
from megatron_ettin.config import RunConfig
from megatron_ettin.training import host_report
from megatron_ettin.training.host_report import HostFacts, corpus_states, report_hosts
from megatron_ettin.training.start_checks import StartError
from tests.conftest import TinyCorpus
from tests.runs import tiny_config

Change = Callable[[HostFacts], HostFacts]


@pytest.fixture
def config(tiny_corpus: TinyCorpus, tmp_path: Path) -> RunConfig:
    corpus = tiny_corpus.copy_to(tmp_path / "corpus")
    return tiny_config(corpus, tmp_path / "run", hardware={"micro_batch_tokens": 512})


def add_host(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Let a second host tell the same as this one, but for `change`."""

    def gather(mine: HostFacts) -> Sequence[HostFacts]:
        first = dataclasses.replace(mine, host="one")
        return [first, change(dataclasses.replace(mine, host="two", agent=1))]

    monkeypatch.setattr(distributed, "all_gather", gather)


def report(config: RunConfig, *, checkpoint_bytes: int = 2**30) -> None:
    report_hosts(config, checkpoint_bytes=checkpoint_bytes, num_checkpoints=3)


@pytest.mark.usefixtures("one_process")
def test_report_of_one_host(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = sorted(tmp_path.iterdir())
    with caplog.at_level(logging.INFO):
        report(config)
    assert sorted(tmp_path.iterdir()) == before, "nothing is left"
    hosts, versions, files, disk = caplog.messages[-4:]
    assert hosts.startswith("hosts: 1, ranks: 1: ")
    assert hosts.endswith("(rank 0); tensor 1 x pipeline 1 x context 1 x data 1")
    assert "python 3." in versions
    assert "megatron-core 0." in versions
    assert "megatron-ettin " in versions
    assert files == "clocks within 0.000 s; 6 corpus files, alike on all"
    assert disk.endswith("for at most 3 checkpoints of 1.00 GiB: 3.00 GiB")


@pytest.mark.usefixtures("one_process")
def test_report_of_two_hosts(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add_host(monkeypatch, lambda f: dataclasses.replace(f, unix_seconds=f.unix_seconds + 7.0))
    with caplog.at_level(logging.INFO):
        report(config)
    assert "hosts: 2, ranks: 2: one (rank 0), two (rank 1); tensor 1 " in caplog.messages[-4]
    assert "clocks within 7.000 s" in caplog.messages[-2]
    assert caplog.records[-2].levelno == logging.WARNING


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda f: dataclasses.replace(f, shows_token=False, run_dir="elsewhere/run"),
            r"elsewhere/run on two: is not the folder .*/run on one, where rank 0 writes",
        ),
        (
            lambda f: dataclasses.replace(f, versions={**f.versions, "torch": "1.0"}),
            r"torch on two: 1\.0, but on one: \d",
        ),
        (
            lambda f: dataclasses.replace(
                f, corpora={path: s for path, s in f.corpora.items() if "beta.bin" not in path}
            ),
            r"beta\.bin on two: not there, but on one: [\d,]+ bytes",
        ),
    ],
    ids=["folder", "version", "corpus"],
)
def test_difference_stops_the_run(
    change: Change, named: str, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_host(monkeypatch, change)
    with pytest.raises(StartError, match=named):
        report(config)


@pytest.mark.usefixtures("one_process")
def test_disk_without_room_for_a_checkpoint_stops_the_run(config: RunConfig) -> None:
    with pytest.raises(StartError, match=r"GiB free, but a checkpoint takes 1048576\.00 GiB"):
        report(config, checkpoint_bytes=2**50)


def test_state_of_a_corpus_tells_size_time_and_error(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    states = corpus_states(config)
    assert list(states) == [
        str(folder / f"{name}{suffix}")
        for name in ("alpha", "beta", "held_out")
        for suffix in (".idx", ".bin")
    ]
    shutil.copy2(folder / "alpha.bin", folder / "kept")
    seconds = int((folder / "kept").stat().st_mtime)
    os.utime(folder / "kept", (seconds, seconds))
    (folder / "kept").replace(folder / "alpha.bin")
    assert corpus_states(config) == states, "programs that copy may drop parts of a second"
    os.utime(folder / "alpha.bin", (0, 0))
    (folder / "beta.bin").write_bytes(b"1234")
    (folder / "held_out.idx").unlink()
    changed = corpus_states(config)
    assert changed[str(folder / "alpha.bin")].endswith("bytes of 1970-01-01 00:00:00 UTC")
    assert changed[str(folder / "beta.bin")].startswith("4 bytes of ")
    assert changed[str(folder / "held_out.idx")] == "No such file or directory"


@pytest.mark.usefixtures("one_process")
def test_report_takes_no_time(config: RunConfig) -> None:
    report(config)
    begin = time.perf_counter()
    report(config)
    assert time.perf_counter() - begin < 0.2


def test_folder_above_is_the_root_at_most() -> None:
    assert host_report._above(Path("/a/b"), 1) == Path("/a")
    assert host_report._above(Path("/a/b"), 9) == Path("/")
