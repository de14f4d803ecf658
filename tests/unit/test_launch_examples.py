"""`examples/launch/`: each file parses, and starts torchrun with a command line that a run takes.

The scripts run, with programs in place of torchrun, srun and scontrol that write down what they are
called with.
"""

import itertools
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from megatron_ettin.config import RunConfig, parse_args

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples/launch"
MODULE = ["-m", "megatron_ettin.pretrain"]
#: Variables that a launcher sets, for the first of two nodes.
VARIABLES = {
    "PET_MASTER_ADDR": "first",
    "PET_MASTER_PORT": "29400",
    "PET_NODE_RANK": "0",
    "SKYPILOT_NODE_IPS": "first\nsecond",
    "SKYPILOT_NODE_RANK": "0",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_NUM_NODES": "2",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "[first-second]",
    "SLURM_JOB_NUM_NODES": "2",
}
STAND_INS = {
    "torchrun": 'printf "%s\\n" "$@" > torchrun.words',
    # Only a torchrun that srun started, and that is to be asked to stop, goes on.
    "srun": 'set -e; while [[ $1 == -* ]]; do shift; done; trap "touch asked; exit 1" USR1; "$@"; '
    "[ ! -e waits ] || { touch waiting; until false; do sleep 0.05; done; }",
    "scontrol": 'if [ "$1" = show ]; then printf "first\\nsecond\\n"; '
    'else printf "%s\\n" "$*" > requeued; fi',
}


def scripts_of(name: str) -> str:
    """Return the shell script of a file of examples/launch."""
    text = (LAUNCH / name).read_text()
    if name.endswith(".sh"):
        return text
    document = yaml.safe_load(text)
    if name == "trainjob.yaml":
        trainer = document["spec"]["trainer"]
        assert trainer["command"] == ["bash", "-c"]
        (script,) = trainer["args"]
        names = {variable["name"]: variable["value"] for variable in trainer["env"]}
    else:
        script, names = document["run"], document["envs"]
    return "".join(f'export {key}="{value}"\n' for key, value in names.items()) + str(script)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder as the launchers expect it, with the stand-ins in bin/."""
    (tmp_path / "bin").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    for name, script in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "examples/launch").mkdir(parents=True)
    return tmp_path


def start(name: str, place: Path) -> subprocess.Popen[str]:
    """Start a file's script in `place`, as the first of two nodes."""
    script = scripts_of(name).replace("cd /shared/megatron-ettin", f"cd {place}")
    (place / "examples/launch/script.sh").write_text(script)
    return subprocess.Popen(
        ["bash", "examples/launch/script.sh", "first"],
        cwd=place,
        env={**os.environ, **VARIABLES, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"},
        stderr=subprocess.PIPE,
        text=True,
    )


def config_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Return the run that torchrun's words start."""
    (at,) = [n for n in range(len(words)) if words[n : n + 2] == MODULE]
    monkeypatch.chdir(ROOT)
    return parse_args(words[at + 2 :])


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_launcher_starts_a_run_that_resumes(
    path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = scripts_of(path.name)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=" in script
    process = start(path.name, place)
    errors = process.communicate(timeout=30)[1]
    assert (process.returncode, errors) == (0, "")
    words = (place / "torchrun.words").read_text().splitlines()
    options = dict(itertools.pairwise(words))
    assert options["--rdzv-backend"] == "c10d"
    assert options["--rdzv-endpoint"] == "first:29400"
    assert int(options["--max-restarts"]) > 0
    config = config_of(words, monkeypatch)
    assert config.checkpoint.resume
    assert config.checkpoint.save_every_tokens
    assert config.run_dir == "runs/150m-encoder"
    assert [phase.name for phase in config.phases] == ["pretrain", "extension", "decay"]


def test_launchers_start_the_same_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = []
    for path in sorted(LAUNCH.iterdir()):
        start(path.name, place).communicate(timeout=30)
        words = (place / "torchrun.words").read_text().splitlines()
        configs.append(config_of(words, monkeypatch))
    assert len(configs) == 4
    assert all(config == configs[0] for config in configs)


def test_slurm_queues_again_before_the_time_limit(place: Path) -> None:
    (place / "waits").touch()
    process = start("slurm.sh", place)
    deadline = time.monotonic() + 30
    while not (place / "waiting").exists():
        assert time.monotonic() < deadline, "torchrun was never started"
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    errors = process.communicate(timeout=30)[1]
    assert (process.returncode, errors) == (0, "")
    assert (place / "asked").exists()
    words = (place / "torchrun.words").read_text().splitlines()
    assert "SIGUSR1" in dict(itertools.pairwise(words))["--signals-to-handle"].split(",")
    assert (place / "requeued").read_text() == "requeue 7\n"


def test_slurm_does_not_queue_a_failure_again(place: Path) -> None:
    (place / "bin/torchrun").write_text("#!/usr/bin/env bash\nexit 3\n")
    process = start("slurm.sh", place)
    process.communicate(timeout=30)
    assert process.returncode == 3
    assert not (place / "requeued").exists()


def test_trainjob_is_of_the_trainers_api() -> None:
    document = yaml.safe_load((LAUNCH / "trainjob.yaml").read_text())
    assert document["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert document["kind"] == "TrainJob"
    assert document["spec"]["trainer"]["numNodes"] == 2
