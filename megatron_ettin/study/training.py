"""Training of one model of a study: the command, whether its run is complete, the process."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from megatron_ettin import checkpoint, checkpoint_files
from megatron_ettin.config import PhaseConfig, RunConfig, parse_args
from megatron_ettin.data.orders import open_order
from megatron_ettin.study.arms import Study, StudyModel
from megatron_ettin.study.config import StudyConfig

#: Sections that decide what a run computes; the others are layout, places and reports.
COMPUTATION = ("objective", "model", "data", "optimizer", "validation", "seeds")
#: Last lines of a training in which the reason of its failure is looked for.
TAIL_LINES = 200


def training_arguments(study: Study, model: StudyModel) -> list[str]:
    """Return the options of `megatron_ettin.pretrain` for a model of the study.

    The checkpoint that it starts from is left out (`starting_checkpoint`).

    Raises:
        ConfigError: naming file and field.
    """
    config, files = study.config, _files(study.config, model)
    arguments = [f"--config={file}" for file in files]
    assert model.run is not None, "only trained models have a run"
    given = parse_args([*arguments, f"--run_dir={model.run.path}"])
    factor = _factor(config, model)
    phases = [phase.scaled(factor) for phase in given.phases]
    for before, phase in zip(given.phases, phases, strict=True):
        arguments += _changes(before, phase)
    for seed in dataclasses.fields(given.seeds):
        value = getattr(given.seeds, seed.name) + (model.seed or 0)
        arguments.append(f"--seeds.{seed.name}={value}")
    tokens = sum(phase.train_tokens for phase in phases)
    return [
        *arguments,
        f"--run_dir={model.run.path}",
        f"--checkpoint.save_every_tokens={-(-tokens // config.checkpoints)}",
        "--checkpoint.resume=true",
    ]


def training_config(study: Study, model: StudyModel) -> RunConfig:
    """Return the configuration that these options describe."""
    return parse_args(training_arguments(study, model))


def starting_checkpoint(model: StudyModel) -> Path | None:
    """Return the last checkpoint of the model that this one starts from; None for new weights.

    Raises:
        CheckpointError: that model has none.
    """
    if model.start is None:
        return None
    assert model.start.run is not None, "StudyConfig refuses published starts"
    newest = model.start.run.newest_checkpoint()
    if newest is None:
        raise checkpoint_files.CheckpointError(
            f"{model.start.run.path}: no checkpoint here, but {model.name} starts from it"
        )
    return newest


def is_trained(study: Study, model: StudyModel) -> bool:
    """Tell whether the run has reached its end with this configuration, data and start.

    Raises:
        ValueError: the run's folder holds a run with another one.
    """
    assert model.run is not None, "only trained models have a run"
    newest = model.run.newest_checkpoint()
    if newest is None:
        return False
    config, state = training_config(study, model), checkpoint.read_state(newest)
    differing = _differing(checkpoint.read_config(newest), config)
    spec = open_order(config, model.run.begun_order()).spec
    if tuple(spec.phase_ids()) != state.phase_ids and not differing:
        differing.append("documents")
    start = starting_checkpoint(model) if model.start is not None else None
    if start is not None and state.initialized_from is not None:
        files = checkpoint_files.read_files(start)
        if files.sha256 != state.initialized_from["files_sha256"]:
            differing.append("weights to start from")
    if differing:
        raise ValueError(
            f"{model.run.path}: holds a run with another {' and '.join(differing)}: remove it, or "
            f"give the study another output"
        )
    return state.g == state.phase_ends[-1]


def train(study: Study, model: StudyModel) -> None:
    """Train the model, or go on from its newest checkpoint, in processes that end with this one.

    They print where this process does.

    Raises:
        ValueError: the training failed.
    """
    command = [
        *study.config.launch,
        *("-m", "megatron_ettin.pretrain"),
        *training_arguments(study, model),
    ]
    if (start := starting_checkpoint(model)) is not None:
        command.append(f"--checkpoint.initialize_from={start}")
    print(" ".join(command), flush=True)
    # Programs of this environment are found even if it is not activated.
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    child = [sys.executable, "-m", "megatron_ettin.study.child", str(os.getpid())]
    process = subprocess.Popen(
        [*child, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    last: deque[str] = deque(maxlen=TAIL_LINES)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last.append(line.rstrip())
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if code:
        raise ValueError(_reason(last) or f"the training ended with code {code}")


def _reason(lines: Iterable[str]) -> str | None:
    """Return what the last lines of a training say about its failure."""
    for line in lines:
        if line.startswith("error: ") or "OutOfMemoryError" in line:
            return line.removeprefix("error: ")
        if f"exitcode  : -{signal.SIGKILL.value} " in line:
            return "a process was killed (SIGKILL), as the kernel does when memory runs out"
    return None


def _files(config: StudyConfig, model: StudyModel) -> list[str]:
    size, objective = config.sizes[model.size], config.arms[model.arm].objective
    assert objective is not None, "only trained models have files"
    return [*(size.run if model.start is None else size.cross), objective]


def _factor(config: StudyConfig, model: StudyModel) -> float:
    """Return the tokens of the study over those in the files of the size's `run`."""
    if config.train_tokens is None:
        return 1.0
    first = model
    while first.start is not None:
        first = first.start
    files = [f"--config={file}" for file in _files(config, first)]
    whole = sum(phase.train_tokens for phase in parse_args([*files, "--run_dir=unused"]).phases)
    return config.train_tokens / whole


def _changes(before: PhaseConfig, after: PhaseConfig) -> list[str]:
    """Return the options that turn one phase into the other."""
    return [
        f"--phases.{after.name}.{field.name}={getattr(after, field.name)}"
        for field in dataclasses.fields(PhaseConfig)
        if getattr(before, field.name) != getattr(after, field.name)
    ]


def _differing(trained: RunConfig, config: RunConfig) -> list[str]:
    """Return the sections in which a run differs from a configuration that it was not given."""
    differing = [name for name in COMPUTATION if getattr(trained, name) != getattr(config, name)]
    phases = [
        # A run fills in the RoPE bases that a phase does not name.
        dataclasses.replace(
            phase,
            rotary_base_global=phase.rotary_base_global or filled.rotary_base_global,
            rotary_base_local=phase.rotary_base_local or filled.rotary_base_local,
        )
        for phase, filled in zip(config.phases, trained.phases, strict=False)
    ]
    return differing if phases == trained.phases else [*differing, "phases"]
