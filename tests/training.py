"""Training in this process, as torchrun with one process would, and what a step starts from.

The start of a torchrun costs ten seconds.
"""

import gc
import itertools
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from pathlib import Path
from typing import Any

from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import RunConfig, parse_args
from megatron_ettin.data.loader import Loader
from megatron_ettin.data.orders import open_order
from megatron_ettin.evaluation.layouts import Curve, read_curve
from megatron_ettin.pretrain import pretrain
from megatron_ettin.training import set_up
from megatron_ettin.training.interval import Interval
from megatron_ettin.training.loop import train_step
from megatron_ettin.training.preparation import phase_micro_batches, prefetch
from tests.conftest import TinyCorpus
from tests.runs import tiny_config

RESUME = "--checkpoint.resume=true"


def train_here(arguments: Sequence[str], run_dir: Path) -> Curve:
    """Train with pretrain's `arguments`, a report a step, and read the curve."""
    pretrain(parse_args([*arguments, f"--run_dir={run_dir}", "--logging.log_every_steps=1"]))
    gc.collect()  # the run's groups keep 60 threads, which wake a hundred times a second
    return read_curve(run_dir)


def steps_saved(run_dir: Path) -> list[int]:
    """List the steps that have a checkpoint."""
    names = [path.name for path in (run_dir / "checkpoints").iterdir()]
    return sorted(int(name.removeprefix("step_")) for name in names)


def cut_off(run_dir: Path, copy: Path, keep: int) -> Path:
    """Copy a run as if it had been cut off some steps after its `keep`-th checkpoint."""
    subprocess.run(["cp", "-r", run_dir, copy], check=True)
    for step in steps_saved(run_dir)[keep:]:
        subprocess.run(["rm", "-r", copy / "checkpoints" / f"step_{step:08d}"], check=True)
    return copy


def tiny_loader(
    corpus: TinyCorpus, folder: Path, objective: str, **sections: Any
) -> tuple[RunConfig, Loader]:
    """Return a run over the tiny corpus and its loader; needs process groups."""
    config = tiny_config(corpus, folder / "run", objective=objective, **sections)
    return config, set_up.build_loader(config, open_order(config))


def starting_state(loader: Loader) -> RunState:
    """Return the state of a run that has taken no step."""
    return RunState(tokenizer_sha256=loader.order.spec.tokenizer_sha256)


def train_within(
    config: RunConfig, block: AbstractContextManager[object], *, before: int, inside: int
) -> tuple[RunState, float]:
    """Train `before` steps of the first phase, then `inside` ones inside a block.

    Needs process groups. Returns the state and the mean loss of all steps.
    """
    order = open_order(config)
    state = set_up.starting_state(config, order)
    run = set_up.build_training(config, order, state)
    with run.reporter:
        state = set_up.restore(run, state)
        interval, end = Interval(), order.spec.phases[0].end_g
        with prefetch(phase_micro_batches(config, run.loader, state, end)) as prepared:
            steps = itertools.groupby(prepared, key=attrgetter("step"))
            for step, batches in itertools.islice(steps, before):
                state = train_step(run, step, batches, state, 1e-3, interval)
            with block:
                for step, batches in itertools.islice(steps, inside):
                    state = train_step(run, step, batches, state, 1e-3, interval)
        loss = interval.sum_over_ranks().loss
    run.recorder.close()
    return state, loss
