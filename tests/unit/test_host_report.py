"""Hosts at the start of a run: what is known of them, and what of two may not differ."""

import dataclasses
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_ettin import distributed
from megatron_ettin.config import RunConfig
from megatron_ettin.training import host_report
from megatron_ettin.training.host_report import HostFacts, Hosts, check_hosts, corpus_states
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


def check(config: RunConfig, *, checkpoint_bytes: int = 2**30) -> Hosts:
    return check_hosts(config, checkpoint_bytes=checkpoint_bytes, num_checkpoints=3)


@pytest.mark.usefixtures("one_process")
def test_one_host(config: RunConfig, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    hosts = check(config)
    assert sorted(tmp_path.iterdir()) == before, "nothing is left"
    assert hosts.ranks == [f"{platform.node()} (rank 0)"]
    assert hosts.num_ranks == 1
    assert hosts.versions["python"] == platform.python_version()
    assert {"megatron-core", "megatron-ettin", "torch"} <= set(hosts.versions)
    assert hosts.clock_spread_seconds == 0.0
    assert hosts.num_corpus_files == 6
    assert hosts.folder == tmp_path
    assert hosts.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert (hosts.num_checkpoints, hosts.checkpoint_bytes) == (3, 2**30)


@pytest.mark.usefixtures("one_process")
def test_two_hosts(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    add_host(monkeypatch, lambda f: dataclasses.replace(f, unix_seconds=f.unix_seconds + 7.0))
    hosts = check(config)
    assert hosts.ranks == ["one (rank 0)", "two (rank 1)"]
    assert hosts.clock_spread_seconds == pytest.approx(7.0)


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
        check(config)


@pytest.mark.usefixtures("one_process")
def test_disk_without_room_for_a_checkpoint_stops_the_run(config: RunConfig) -> None:
    with pytest.raises(StartError, match=r"GiB free, but a checkpoint takes 1048576\.00 GiB"):
        check(config, checkpoint_bytes=2**50)


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
def test_the_check_takes_no_time(config: RunConfig) -> None:
    check(config)
    begin = time.perf_counter()
    check(config)
    assert time.perf_counter() - begin < 0.2


def test_folder_above_is_the_root_at_most() -> None:
    assert host_report._above(Path("/a/b"), 1) == Path("/a")
    assert host_report._above(Path("/a/b"), 9) == Path("/")
