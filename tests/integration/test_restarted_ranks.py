"""Ranks that torchrun starts again meet each other, not what their predecessors left behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig
from tests.ranks import started_ranks

#: Far above what a start takes, and far below the time-out of gloo.
DEADLINE_SECONDS = 120.0
STARTS = 3


def meet() -> None:
    """Make the process groups of a run and use them."""
    with distributed.process_groups(HardwareConfig()):
        assert distributed.all_gather(distributed.rank()) == [0, 1]


@contextmanager
def started(number: int, store: torch.distributed.Store, logs: Path) -> Iterator[list[BaseProcess]]:
    """Start both ranks as torchrun's agent does, with the store of all its starts."""
    environment = {
        "MASTER_PORT": str(store.port),  # type: ignore[attr-defined]
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RESTART_COUNT": str(number),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    with started_ranks(meet, [], ranks=2, logs=logs, environment=environment) as processes:
        yield processes


@pytest.mark.slow
def test_every_start_finds_an_empty_store(tmp_path: Path) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for number in range(STARTS):
        with started(number, store, tmp_path) as processes:
            for process in processes:
                process.join(DEADLINE_SECONDS)
            codes = [process.exitcode for process in processes]
        texts = [(tmp_path / f"rank{rank}.log").read_text()[-2000:] for rank in (0, 1)]
        assert codes == [0, 0], (number, texts)


def test_several_hosts_are_told_to_have_a_new_store(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Restarts are counted by each host for itself, so no prefix can keep the starts apart."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    of_torchrun = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "RANK": "2",
        "WORLD_SIZE": "4",
        "GROUP_WORLD_SIZE": "2",
        "TORCHELASTIC_RESTART_COUNT": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for name, value in of_torchrun.items():
        monkeypatch.setenv(name, value)
    distributed._store_of_this_start().set("key", "of all starts")
    assert store.get("key") == b"of all starts"
    (message,) = caplog.messages
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every host" in message
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    distributed._store_of_this_start().set("other", "of the second start")
    assert store.get("start_1/other") == b"of the second start"
    assert len(caplog.messages) == 1
