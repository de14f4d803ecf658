"""Preprocessing as a datatrove pipeline: on this machine, on a Ray cluster, or through Slurm.

A task takes shards rank, rank + tasks, ... One more task, after all others, makes one corpus of the
shards. A shard that is there already, made from the same content, is left as it is
(`preprocess_shard` decides that), so a run that failed is repeated by the same call.

What datatrove does with a task that fails, and what is made of it here:

    local   the first error ends all tasks and is raised
    ray     a task that raises is not tried again, and only a warning tells; raised here at the end.
            A lost machine's tasks are submitted again, three times
    slurm   nobody waits. A job that is preempted is queued again. The corpus is not made of
            incomplete shards: its job depends on the success of all others
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_ettin.data.duplicates import find_duplicates
from megatron_ettin.data.own_process import run_in_own_process
from megatron_ettin.data.preprocess import finish_dataset, preprocess_shard
from megatron_ettin.data.preprocess_options import PreprocessOptions

try:
    from datatrove.executor import (
        LocalPipelineExecutor,
        RayPipelineExecutor,
        SlurmPipelineExecutor,
    )
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise ImportError(
        f"datatrove is not installed ({error}): pip install 'megatron-ettin[datatrove]'"
    ) from error

EXECUTORS = {
    "local": LocalPipelineExecutor,
    "ray": RayPipelineExecutor,
    "slurm": SlurmPipelineExecutor,
}

ShardWork = Callable[[PreprocessOptions, int], object]
FinishWork = Callable[[PreprocessOptions], object]


class PreprocessShards(PipelineStep):  # type: ignore[misc]
    """Step that makes shards; it takes no documents and gives none."""

    name = "shards of a corpus"
    type = "megatron-ettin"

    def __init__(
        self,
        options: PreprocessOptions,
        *,
        threads: int | None = None,
        work: ShardWork = preprocess_shard,
    ) -> None:
        """Note what to do.

        Args:
            options: its inputs are the shards.
            threads: of the tokenizer; None: one per core.
            work: makes the shard of that number.
        """
        super().__init__()
        self.options, self.threads, self.work = options, threads, work

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Make shards rank, rank + world_size, ..., each in a process of its own.

        Raises RuntimeError, which names the shard, if its process fails or is killed.
        """
        for index in range(rank, len(self.options.inputs), world_size):
            with self.track_time("shard"):
                _run_named(
                    f"shard {index} ({self.options.inputs[index].path})",
                    self.work,
                    (self.options, index),
                    self.threads,
                )
            self.stat_update("shards", unit="task")
        return iter(())


class FinishDataset(PipelineStep):  # type: ignore[misc]
    """Step of one task, that makes one corpus of all shards."""

    name = "corpus of the shards"
    type = "megatron-ettin"

    def __init__(self, options: PreprocessOptions, *, work: FinishWork = finish_dataset) -> None:
        """Note the options and the function."""
        super().__init__()
        self.options, self.work = options, work

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Make the corpus in a process of its own."""
        _run_named(f"corpus {self.options.output_prefix}", self.work, (self.options,), None)
        return iter(())


def run_on(
    executor: str,
    options: PreprocessOptions,
    tasks: int,
    *,
    logging_dir: str | Path | None = None,
    skip_completed: bool = False,
    shard_work: ShardWork = preprocess_shard,
    finish_work: FinishWork = finish_dataset,
    **settings: Any,
) -> str | None:
    """Make the shards of a corpus, then the corpus; return the last job's number if it is Slurm's.

    Args:
        executor: `local`, `ray` or `slurm`. For Ray, `RAY_ADDRESS` names the cluster; without it,
            this machine is one.
        options: of preprocessing.
        tasks: at most as many as shards; for `local` that many at a time.
        logging_dir: folder of datatrove's logs and marks, which all machines see; default: beside
            the output.
        skip_completed: leave out tasks that an earlier run has marked as completed, without a look
            at their shards. Right if nothing has changed since, the number of tasks included.
        shard_work: makes a shard, a function of a module.
        finish_work: makes the corpus, a function of a module.
        settings: further options of the datatrove executor. Slurm needs `time` and `partition`.

    Raises:
        ValueError: for settings that cannot be meant.
        RuntimeError: a task failed; what was made stays, and the next run goes on from there.
    """
    _check(executor, tasks, settings, options)
    if options.deduplicate:
        # All inputs are read once, here, before any shard can be made.
        find_duplicates(options)
    folder = str(logging_dir or f"{options.output_prefix}.logs")
    tasks = min(tasks, len(options.inputs))
    if executor == "slurm":
        settings.setdefault("env_command", _activation())
    threads = _threads_of(executor, tasks, settings)
    shards = EXECUTORS[executor](
        [PreprocessShards(options, threads=threads, work=shard_work)],
        tasks=tasks,
        logging_dir=f"{folder}/shards",
        skip_completed=skip_completed,
        **settings,
    )
    finish = EXECUTORS[executor](
        [FinishDataset(options, work=finish_work)],
        tasks=1,
        logging_dir=f"{folder}/corpus",
        skip_completed=False,
        **{name: value for name, value in settings.items() if name != "workers"},
    )
    if executor == "slurm":
        return _submit(shards, finish)
    for stage in (shards, finish):
        _run_stage(stage)
    return None


def _submit(shards: Any, finish: Any) -> str:
    """Submit both stages, the second one to begin when the first one has succeeded."""
    for stage in (shards, finish):
        _forget_completed(stage)
    finish.depends = shards
    finish.run()
    return str(finish.job_id)


def _run_stage(stage: Any) -> None:
    """Run a stage to its end; raise RuntimeError unless each task is marked as completed."""
    _forget_completed(stage)
    # The local executor's own queue may break before the error of a task gets through.
    with contextlib.suppress(EOFError):
        stage.run()
    missing = stage.get_incomplete_ranks(skip_completed=True)
    if missing:
        logs = stage.logging_dir.resolve_paths("logs")
        raise RuntimeError(f"tasks {missing} of {stage.world_size} failed; their logs: {logs}")


def _forget_completed(stage: Any) -> None:
    """Remove marks of earlier runs, so that a mark tells of this one."""
    if not stage.skip_completed and stage.logging_dir.exists("completions"):
        stage.logging_dir.rm("completions", recursive=True)


def _threads_of(executor: str, tasks: int, settings: dict[str, Any]) -> int:
    """Return the threads of a task, so that those of a machine are as many as its cores."""
    if executor == "local":
        workers = settings.get("workers", -1)
        at_a_time = tasks if workers < 1 else min(tasks, workers)
        return max(1, len(os.sched_getaffinity(0)) // at_a_time)
    return int(settings.get("cpus_per_task", 1))


def _activation() -> str:
    """Return the command that lets a job find this environment's programs, datatrove's included."""
    return f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"


def _check(executor: str, tasks: int, settings: dict[str, Any], options: PreprocessOptions) -> None:
    if options.deduplicate and options.store is not None:
        raise ValueError(
            "deduplicate: the tasks of an executor need an --output-prefix that is a folder which "
            "all of them see, not a URL"
        )
    if executor not in EXECUTORS:
        raise ValueError(f"executor {executor!r}: choose one of {', '.join(EXECUTORS)}")
    if tasks < 1:
        raise ValueError(f"tasks {tasks}: at least 1 is needed")
    if executor != "slurm":
        return
    missing = [name for name in ("time", "partition") if name not in settings]
    if missing:
        raise ValueError(f"slurm needs {' and '.join(missing)}, as sbatch's options of that name")
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise ValueError("slurm: submit from outside of a job; datatrove takes this one for a task")


def _run_named(
    what: str, work: Callable[..., object], arguments: tuple[Any, ...], threads: int | None
) -> None:
    try:
        run_in_own_process(work, arguments, threads=threads)
    except RuntimeError as error:
        raise RuntimeError(f"{what}: {error}") from None
