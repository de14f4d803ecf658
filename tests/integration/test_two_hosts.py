"""Two hosts for real: two network namespaces with hostnames of their own, a torchrun agent in each.

The namespaces have no names. The kernel removes one, with its end of the cable, when its last
process is gone, and it kills the processes when the test's own process ends, however that happens.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_ettin.evaluation.layouts import Curve, Layout, read_curve
from megatron_ettin.order.run_folder import RunFolder
from tests.conftest import TinyCorpus
from tests.ranks import run_layouts

NAMES = ("ettin-a", "ettin-b")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
CABLE = "ettin0"
PORT = 29_400
#: Ranks that share a layer are on one host. The other axis crosses the cable.
LAYOUTS = {
    "pipeline across": Layout(4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
    "data across": Layout(4, {"tensor_parallel_size": 2}),
}
#: By default torchrun's agents keep the address of the workers' store from their first rendezvous.
#: An agent that comes later then waits for it in vain (torch 2.13).
NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
#: Far above what a start of four ranks takes here.
DEADLINE_SECONDS = 600.0
DIES_WITH_THE_TEST = ("setpriv", "--pdeathsig", "KILL")
NAMESPACES = ("unshare", "--net", "--uts")


def can_make_hosts() -> bool:
    if any(shutil.which(tool) is None for tool in ("ip", "nsenter", "setpriv", "unshare")):
        return False
    makes = [*NAMESPACES, "ip", "link", "add", CABLE, "type", "veth", "peer", "name", "other"]
    return subprocess.run(makes, capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_hosts(), reason="needs the right to make network namespaces"),
]


@dataclass
class Host:
    """A network namespace with a hostname; its processes see the files of the machine."""

    name: str
    address: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        """Make the namespaces, which a process that sleeps holds."""
        script = f"hostname {self.name} && ip link set lo up && echo && exec sleep infinity"
        self.holder = subprocess.Popen(
            [*DIES_WITH_THE_TEST, *NAMESPACES, "sh", "-c", script], stdout=subprocess.PIPE
        )
        self.processes.append(self.holder)
        assert self.holder.stdout is not None
        with self.holder.stdout as output:
            output.readline()

    @property
    def enter(self) -> list[str]:
        """The words before a command that runs on this host."""
        return ["nsenter", "-t", str(self.holder.pid), "--net", "--uts", "--"]

    def run(self, *command: str) -> str:
        done = subprocess.run([*self.enter, *command], capture_output=True, text=True, check=True)
        return done.stdout

    def launch(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        restarts: int = 3,
        own_folder: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start this host's torchrun; the first host's holds the rendezvous.

        At `own_folder` the host sees a folder of its own.
        """
        mount = 'mount -t tmpfs none "$0" && exec "$@"'
        own = [] if own_folder is None else ["unshare", "-m", "sh", "-c", mount, str(own_folder)]
        is_first = str(self.address == ADDRESSES[0]).lower()
        command = [
            *DIES_WITH_THE_TEST,
            *self.enter,
            *own,
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"),
            *(f"--max-restarts={restarts}", "--rdzv-backend=c10d", "--rdzv-id=two-hosts"),
            *(f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}", f"--rdzv-conf=is_host={is_first}"),
            f"--local-addr={self.address}",
            *("-m", "megatron_ettin.pretrain", "--checkpoint.resume=true", *arguments),
        ]
        variables = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE}
        environment = {**os.environ, **variables, **NEW_STORE}
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return process


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Give a test two hosts with a cable between them."""
    pair = (Host(NAMES[0], ADDRESSES[0]), Host(NAMES[1], ADDRESSES[1]))
    try:
        for host in pair:
            host.start()
        far_end = ("peer", "name", CABLE, "netns", str(pair[1].holder.pid))
        pair[0].run("ip", "link", "add", CABLE, "type", "veth", *far_end)
        for host in pair:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", CABLE)
            host.run("ip", "link", "set", CABLE, "up")
        yield pair
    finally:
        for process in [process for host in pair for process in reversed(host.processes)]:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def config(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run of twelve steps."""
    path = tmp_path_factory.mktemp("hosts") / "run.yaml"
    phase = {"name": "short", "train_tokens": 20_000, "seq_length": 128, "global_batch_size": 16}
    return tiny_corpus.write_config(path, objective="MaskedLM", phases=[phase])


@pytest.fixture(scope="module")
def one_host(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    """Return the curves of the same layouts on one host, which runs undisturbed."""
    folder = tmp_path_factory.mktemp("one_host")
    jobs = [
        (layout, [f"--config={config}", f"--run_dir={folder / name}"])
        for name, layout in LAYOUTS.items()
    ]
    run_layouts(jobs, ranks=4, folder=folder)
    return {name: read_curve(folder / name) for name in LAYOUTS}


def arguments_of(name: str, config: Path, run_dir: Path) -> list[str]:
    saves = ["--checkpoint.save_every_tokens=4000", "--logging.log_every_steps=1"]
    return [f"--config={config}", f"--run_dir={run_dir}", *LAYOUTS[name].arguments(), *saves]


def wait_for_the_end(processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    for process in processes:
        try:
            code: int | str = process.wait(timeout=deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            code = "nothing in time"
        assert code == 0, f"{code}\n" + "\n\n".join(log.read_text()[-4000:] for log in logs)


def test_hosts_are_two(hosts: tuple[Host, Host]) -> None:
    assert [host.run("hostname").strip() for host in hosts] == list(NAMES)
    for host, other in (hosts, hosts[::-1]):
        assert other.address not in host.run("ip", "address")
        assert other.address in host.run("ip", "route", "get", other.address)


def test_two_hosts_train_as_one_does(
    hosts: tuple[Host, Host], one_host: dict[str, Curve], config: Path, tmp_path: Path
) -> None:
    arguments = arguments_of("pipeline across", config, tmp_path / "run")
    logs = [tmp_path / f"{host.name}.log" for host in hosts]
    agents = [host.launch(arguments, log) for host, log in zip(hosts, logs, strict=True)]
    wait_for_the_end(agents, logs)
    curve = read_curve(tmp_path / "run")
    assert curve.largest_relative_difference(one_host["pipeline across"]) <= 1e-5
    assert curve.token_digest == one_host["pipeline across"].token_digest


def test_a_host_that_stops_and_comes_back_is_taken_in_again(
    hosts: tuple[Host, Host], one_host: dict[str, Curve], config: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    arguments = arguments_of("data across", config, run.path)
    logs = [tmp_path / f"{host.name}.log" for host in hosts]
    first, second = (host.launch(arguments, log) for host, log in zip(hosts, logs, strict=True))
    deadline = time.monotonic() + DEADLINE_SECONDS
    while run.newest_checkpoint() is None:
        assert first.poll() is None, logs[0].read_text()[-4000:]
        assert time.monotonic() < deadline, "the run never saved"
        time.sleep(0.02)
    second.kill()  # the kernel kills its ranks with it
    second.wait()
    assert len(run.read_metrics()) < len(one_host["data across"].losses), "it came too late"
    again = hosts[1].launch(arguments, logs[1])
    wait_for_the_end([first, again], logs)
    assert "resumed from" in logs[0].read_text()
    curve = read_curve(run.path)
    assert curve.largest_relative_difference(one_host["data across"]) <= 1e-5
    assert curve.token_digest == one_host["data across"].token_digest


def test_a_host_with_another_run_folder_is_named(
    hosts: tuple[Host, Host], config: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    arguments = arguments_of("data across", config, run.path)
    logs = [tmp_path / f"{host.name}.log" for host in hosts]
    first = hosts[0].launch(arguments, logs[0], restarts=0)
    second = hosts[1].launch(arguments, logs[1], restarts=0, own_folder=run.path)
    assert (first.wait(DEADLINE_SECONDS), second.wait(DEADLINE_SECONDS)) == (1, 1)
    expected = (
        f"error: {run.path} on ettin-b: is not the folder {run.path} on ettin-a, where rank 0"
    )
    assert all(expected in log.read_text() for log in logs)
    assert list(run.path.iterdir()) == []
