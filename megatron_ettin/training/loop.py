"""train(): optimizer steps one after the other; reporting, validation and saving in plain sight."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ettin import checkpoint, distributed
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import PhaseConfig, RunConfig
from megatron_ettin.data.loader import Loader
from megatron_ettin.model.ettin_model import EttinModel
from megatron_ettin.objectives import Batch
from megatron_ettin.order import PhaseSpec, token_digest
from megatron_ettin.training.forward_step import forward_step
from megatron_ettin.training.metrics import Reporter
from megatron_ettin.training.optimizer import ShardedStableAdamW
from megatron_ettin.training.schedule import learning_rate
from megatron_ettin.training.validation import Validation


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything a step needs."""

    config: RunConfig
    stage: EttinModel
    ddp: DistributedDataParallel
    optimizer: ShardedStableAdamW
    loader: Loader
    validation: Validation | None
    reporter: Reporter


class DivergedError(ValueError):
    """The loss is no number any more; nothing was saved after it."""


class Interval:
    """What this rank has seen since the last report; summed over ranks when one is due."""

    def __init__(self) -> None:
        """Start an interval."""
        self.digest = np.zeros(2, dtype=np.uint64)
        self.losses = torch.zeros(2, dtype=torch.float64, device=distributed.device())
        self.tokens = 0
        self.started = time.perf_counter()

    def add(self, reports: list[dict[str, torch.Tensor]], tokens: int) -> None:
        """Add a step's reports (empty but on the last stage) without waiting for the device."""
        for report in reports:
            self.losses[0] += report["loss_sums"].sum()
            self.losses[1] += report["counts"].sum()
        self.tokens += tokens

    def consume(self, batches: Iterator[Batch], loader: Loader) -> Iterator[Batch]:
        """Yield batches, adding the tokens of each to the digest as it is handed to the model."""
        for batch in batches:
            if distributed.counts_rows():
                tokens = loader.objective.original_tokens(batch)
                self.digest += token_digest(batch.rows, tokens)
            yield batch

    def summed(self) -> tuple[float, tuple[int, int]]:
        """Return (mean loss per scored token, digest lanes) over all ranks."""
        counts = distributed.counts_rows()
        losses = distributed.all_reduce_sum(
            self.losses if counts else torch.zeros_like(self.losses)
        )
        lanes = distributed.all_reduce_sum(torch.from_numpy(self.digest.view(np.int64)))
        low, high = lanes.cpu().numpy().view(np.uint64).tolist()
        return float(losses[0] / losses[1]), (low, high)


def train(run: Training, state: RunState) -> RunState:
    """Run the steps from `state` to the end of the last phase and return where the run ended."""
    spec = run.loader.order.spec
    for index in range(spec.phase_index(state.g), len(spec.phases)):
        phase, settings = spec.phases[index], run.config.phases[index]
        run.stage.set_rotary_bases(settings.rotary_base_global, settings.rotary_base_local)
        if state.phase != phase.name:
            state = dataclasses.replace(state, phase=phase.name, phase_tokens=0)
        state = _train_phase(run, phase, settings, state)
    return state


def _train_phase(
    run: Training, phase: PhaseSpec, settings: PhaseConfig, state: RunState
) -> RunState:
    """Run the phase's steps; its last one may be short, none crosses it."""
    interval = Interval()
    while state.g < phase.end_g:
        before = state
        end = min(state.g + settings.global_batch_size, phase.end_g)
        lr = learning_rate(
            run.config.optimizer,
            settings,
            run_tokens=state.consumed_tokens,
            phase_tokens=state.phase_tokens,
        )
        state = train_step(run, state, end, lr, interval)
        ends = state.g == phase.end_g
        saves = ends or _crosses(run.config.checkpoint.save_every_tokens, before, state)
        if saves or state.step % run.config.logging.log_every_steps == 0:
            state = _report(run, state, lr, interval)
            interval = Interval()
        if run.validation is not None and (
            state.g == run.loader.order.spec.num_rows
            or _crosses(run.config.validation.every_tokens, before, state)
        ):
            run.reporter.validation(state, run.validation.measure(run.ddp))
        if saves:
            folder = checkpoint.folder_of(Path(run.config.run_dir), state.step)
            checkpoint.save(folder, run.stage, run.optimizer, config=run.config, state=state)
    return state


def train_step(run: Training, state: RunState, end: int, lr: float, interval: Interval) -> RunState:
    """Take one optimizer step over rows [state.g, end) of one phase and return the new state."""
    run.ddp.train()
    run.ddp.zero_grad_buffer()
    run.optimizer.zero_grad()
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=interval.consume(run.loader.micro_batches(state.g, end), run.loader),
        model=run.ddp,
        num_microbatches=run.loader.num_micro_batches(state.g, end),
        seq_length=run.config.hardware.micro_batch_tokens,
        micro_batch_size=1,
    )
    run.optimizer.set_lr(lr)
    run.optimizer.step()
    tokens = run.loader.order.count_tokens(state.g, end)
    interval.add(reports, tokens)
    run.reporter.advance(tokens)
    return dataclasses.replace(
        state,
        g=end,
        step=state.step + 1,
        consumed_tokens=state.consumed_tokens + tokens,
        phase_tokens=state.phase_tokens + tokens,
    )


def _report(run: Training, state: RunState, lr: float, interval: Interval) -> RunState:
    """Write the interval's line and return the state with the digest up to here."""
    loss, (low, high) = interval.summed()
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss is {loss} at step {state.step} (rows up to {state.g}): resume from the last "
            f"checkpoint with a lower optimizer.lr"
        )
    wrap = 1 << 64
    digest = ((state.token_digest[0] + low) % wrap, (state.token_digest[1] + high) % wrap)
    state = dataclasses.replace(state, token_digest=digest)
    seconds = time.perf_counter() - interval.started
    run.reporter.training(state, loss=loss, lr=lr, tokens=interval.tokens, seconds=seconds)
    return state


def _crosses(every_tokens: int | None, before: RunState, state: RunState) -> bool:
    if every_tokens is None:
        return False
    return before.consumed_tokens // every_tokens < state.consumed_tokens // every_tokens
