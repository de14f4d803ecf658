"""The command of the TrainJob, run on two nodes that are groups of processes of this machine.

The local process backend of Kubeflow's SDK takes no TrainJob (docs/launching.md). So this test is
the Trainer: it sets the variables of the runtime `torch-distributed`, and starts a pod again.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml

from megatron_ettin.evaluation.layouts import Layout, final_weights, read_curve
from megatron_ettin.order.run_folder import RunFolder
from tests.conftest import TinyCorpus
from tests.ranks import ROOT, free_ports, run_layouts

CLONE = "/shared/megatron-ettin"
PHASES = ("pretrain", "extension", "decay")
#: Far above what a start, and the search of an agent for one that is gone, take.
DEADLINE_SECONDS = 400.0


def script_and_variables() -> tuple[str, dict[str, str]]:
    """Return what a pod of the TrainJob runs, and its variables."""
    document = yaml.safe_load((ROOT / "examples/launch/trainjob.yaml").read_text())
    trainer = document["spec"]["trainer"]
    assert trainer["command"] == ["bash", "-c"]
    return trainer["args"][0], {each["name"]: each["value"] for each in trainer["env"]}


@pytest.fixture
def clone(tiny_corpus: TinyCorpus, tmp_path: Path) -> Path:
    """Return the shared folder, where the files that the command names are those of a small run."""
    corpus = tiny_corpus.copy_to(tmp_path / "corpus")
    sections = yaml.safe_load(corpus.write_config(tmp_path / "whole.yaml").read_text())
    blend = sections["data"]["blend"]["short"]
    sections["data"] |= {
        "blend": dict.fromkeys(PHASES, blend),
        "pools": {name: [n / 3, (n + 1) / 3] for n, name in enumerate(PHASES)},
    }
    del sections["phases"]
    files = {f"phase/{name}": {"phases+": [phase_of(name)]} for name in PHASES}
    files |= {
        "model/150m": {name: sections.pop(name) for name in ("model", "optimizer")},
        "objective/mlm": {"objective": "MaskedLM"},
        "data/ettin": {"data": sections.pop("data")},
        "hardware/8xh100": sections,
    }
    for name, content in files.items():
        path = tmp_path / "examples" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    return tmp_path


def phase_of(name: str) -> dict[str, object]:
    return {"name": name, "train_tokens": 12_000, "seq_length": 128, "global_batch_size": 8}


@contextmanager
def pods() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Give a list of pods; those that are alive at the end are killed."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield started
    finally:
        for pod in started:
            kill_pod(pod)


def kill_pod(pod: subprocess.Popen[bytes]) -> None:
    """Kill torchrun; the kernel kills its rank."""
    with suppress(ProcessLookupError):
        os.killpg(pod.pid, signal.SIGKILL)
    pod.wait()


def start_pod(clone: Path, rank: int, port: int) -> subprocess.Popen[bytes]:
    """Start a pod as the Trainer does, with one process."""
    script, variables = script_and_variables()
    assert CLONE in script
    of_runtime = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "1",
        "PET_NODE_RANK": str(rank),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(port),
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (clone / f"pod{rank}.log").open("ab") as log:
        return subprocess.Popen(
            ["bash", "-c", script.replace(CLONE, str(clone))],
            # A pod finds torchrun in its image.
            env={**os.environ, "PATH": path, **variables, **of_runtime},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def logs(clone: Path) -> str:
    return "\n\n".join(path.read_text()[-4000:] for path in sorted(clone.glob("pod*.log")))


def wait_for_the_end(started: Sequence[subprocess.Popen[bytes]], clone: Path) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    for pod in started:
        assert pod.wait(timeout=deadline - time.monotonic()) == 0, logs(clone)


@pytest.mark.slow
def test_a_pod_that_is_killed_and_comes_back(clone: Path) -> None:
    run = RunFolder(clone / "runs/150m-encoder")
    (port,) = free_ports(1)
    with pods() as started:
        started += [start_pod(clone, rank, port) for rank in (0, 1)]
        deadline = time.monotonic() + DEADLINE_SECONDS
        while run.newest_checkpoint() is None:
            assert started[0].poll() is None, logs(clone)
            assert time.monotonic() < deadline, "the run never saved"
            time.sleep(0.02)
        kill_pod(started[1])
        started[1] = start_pod(clone, 1, port)
        wait_for_the_end(started, clone)
    files = sorted((clone / "examples").rglob("*.yaml"))
    alone = clone / "alone"
    phases = [clone / f"examples/phase/{name}.yaml" for name in PHASES]
    others = [path for path in files if path not in phases]
    configs = [f"--config={path}" for path in [*others, *phases]]
    run_layouts([(Layout(2), [*configs, f"--run_dir={alone}"])], ranks=2, folder=clone)
    curve, expected = read_curve(run.path), read_curve(alone)
    assert f"resumed from {run.checkpoints.relative_to(clone)}" in (clone / "pod0.log").read_text()
    assert curve == expected, "losses are equal, bit for bit"
    weights, wanted = final_weights(run.path), final_weights(alone)
    assert all(bool((weights[name] == wanted[name]).all()) for name in wanted)
