"""Loop over optimizer steps, with reports, validation and checkpoints in plain sight."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel

from megatron_ettin import distributed
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import PhaseConfig, RunConfig
from megatron_ettin.data.loader import Loader
from megatron_ettin.model.ettin_model import EttinModel
from megatron_ettin.order import PhaseSpec
from megatron_ettin.order.steps import pass_skipped_rows
from megatron_ettin.training.interval import Interval
from megatron_ettin.training.keeper import Keeper
from megatron_ettin.training.metrics import Reporter
from megatron_ettin.training.micro_batch import ForwardBackward, forward_step
from megatron_ettin.training.optimizer import Optimizer, learning_rate
from megatron_ettin.training.preparation import (
    Prepared,
    StepRange,
    phase_micro_batches,
    prefetch,
)
from megatron_ettin.training.recorder import Recorder
from megatron_ettin.training.saving import Saver
from megatron_ettin.training.signals import StopRequest, StopSignals
from megatron_ettin.training.trouble import DivergedError, TroubledStepError, Watch
from megatron_ettin.training.validation import Validation
from megatron_ettin.training.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class Training:
    """Parts of a run that a step needs, for this rank."""

    config: RunConfig
    stage: EttinModel
    ddp: DistributedDataParallel
    forward_backward: ForwardBackward
    optimizer: Optimizer
    loader: Loader
    validation: Validation | None
    reporter: Reporter
    recorder: Recorder
    watch: Watch
    keeper: Keeper
    saver: Saver
    stop: StopSignals
    watchdog: Watchdog


def train(run: Training, state: RunState) -> RunState:
    """Run the steps from `state` to the end of the last phase; return the state at the end.

    A run that is asked to stop (`StopSignals`) saves after its step, and ends there. A run that
    goes back to its last checkpoint (`Watch.goes_back`) ends too: `pretrain` resumes it.
    """
    spec = run.loader.order.spec
    with _profile(run.config) as step_done:
        for index in range(spec.phase_index(state.g), len(spec.phases)):
            phase, settings = spec.phases[index], run.config.phases[index]
            run.stage.set_rotary_bases(*settings.rotary_bases)
            if state.phase != phase.name:  # a resumed run may be inside its phase
                state = dataclasses.replace(
                    state, phase=phase.name, phase_tokens=0, recent_losses=()
                )
                run.recorder.record_phase(state, index, phase)
            state = _skip(run, phase, state)
            # An intervention changes all steps after it, so they are planned and prepared anew.
            while state.g < phase.end_g and not _ends_early(run):
                try:
                    state = _train_steps(run, phase, settings, state, step_done)
                except DivergedError:  # on all ranks
                    run.saver.wait()
                    raise
            # The last checkpoint, and the last heads of an anchor, may take their time.
            run.watchdog.expect_long_work()
            if run.watch.goes_back:
                run.recorder.close()
                return state
            if run.stop.request and state.g < spec.num_rows:
                state = run.saver.finish(state)
                run.recorder.close()
                return state
    return run.recorder.record_end(run.saver.finish(state))


def _ends_early(run: Training) -> bool:
    return bool(run.stop.request) or run.watch.goes_back


def _train_steps(
    run: Training,
    phase: PhaseSpec,
    settings: PhaseConfig,
    state: RunState,
    step_done: Callable[[], None],
) -> RunState:
    """Run the phase's steps up to an intervention; the last may be short, none spans two phases."""
    keeps_rows = run.config.logging.row_losses
    interval = Interval(keeps_rows=keeps_rows)
    skipped = run.watch.skipped
    run.watchdog.expect_long_work()
    coming = phase_micro_batches(run.config, run.loader, state, phase.end_g, skipped.ranges)
    with prefetch(coming) as prepared:
        run.reporter.times.begin()
        for step, batches in itertools.groupby(prepared, key=attrgetter("step")):
            before = state
            lr = learning_rate(
                run.config.optimizer,
                settings,
                run_tokens=state.consumed_tokens,
                phase_tokens=state.phase_tokens,
            )
            is_troubled = False
            try:
                state = train_step(run, step, batches, state, lr, interval)
            except TroubledStepError as troubled:
                interval.drop_step()
                run.watch.take(troubled.intervention)
                is_troubled = True
            is_last = run.stop.agree() != StopRequest.NONE
            run.watchdog.step_done(state.step)
            step_done()
            # Skipped rows that follow count as done: a phase may end with some.
            next_g = pass_skipped_rows(phase, skipped.ranges, state.g)
            ends = next_g == phase.end_g
            logs = state.step % run.config.logging.log_every_steps == 0
            is_due = ends or _crosses(run.config.checkpoint.save_every_tokens, before, state)
            saves = is_due or is_last or (logs and run.saver.is_owed)
            # A checkpoint and a skip need the steps before them in the ledger, so both report.
            if interval.has_steps and (logs or saves or next_g > state.g):
                state = _report(run, state, interval)
                interval = Interval(keeps_rows=keeps_rows)
            state = _skip(run, phase, state)
            if run.watch.goes_back:
                break
            if run.validation is not None and (
                state.g == run.loader.order.num_rows
                or _crosses(run.config.validation.every_tokens, before, state)
            ):
                _validate(run, run.validation, state)
            if saves and state.step > run.watch.saved_step:
                with run.watchdog.long_work():
                    run.saver.begin(state)
                run.watch.begin_after_checkpoint(state.step)
            if is_last or is_troubled:
                break
            run.reporter.times.begin()
    return state


def _validate(run: Training, validation: Validation, state: RunState) -> None:
    """Measure and report the held-out loss of the phase's objective."""
    with run.watchdog.long_work():
        held_out = validation.measure(run.ddp, state.phase)
        run.reporter.report_validation(state, held_out)


def train_step(
    run: Training,
    step: StepRange,
    batches: Iterator[Prepared],
    state: RunState,
    lr: float,
    interval: Interval,
) -> RunState:
    """Take one optimizer step over its micro-batches and return the new state.

    On a GPU the call returns while the GPU still computes: the step reads nothing back, unless the
    settings of `trouble` ask to look at it before the update.

    Raises:
        TroubledStepError: the step must not be taken, and was not.
    """
    interval.begin_step(step)
    run.ddp.zero_grad_buffer()
    run.optimizer.zero_grad()
    reports = run.forward_backward(
        forward_step_func=forward_step,
        data_iterator=interval.consume(batches),
        model=run.ddp,
        num_microbatches=run.loader.num_micro_batches(step.g_begin, step.g_end),
        # Megatron-Core sees each micro-batch as one sequence of all its slots.
        seq_length=run.loader.micro_batch_slots(step.g_begin),
        micro_batch_size=1,
    )
    recent_losses = run.watch.examine(step, state, reports, run.optimizer)
    run.saver.wait_for_copy()
    run.optimizer.set_lr(lr)
    with interval.optimizer.measure():
        run.optimizer.step()
    interval.add_losses(reports)
    run.reporter.advance_bar(step.tokens)
    return dataclasses.replace(
        state,
        g=step.g_end,
        step=step.step,
        consumed_tokens=state.consumed_tokens + step.tokens,
        phase_tokens=state.phase_tokens + step.tokens,
        recent_losses=recent_losses,
    )


def _skip(run: Training, phase: PhaseSpec, state: RunState) -> RunState:
    """Leave out the rows that are skipped here, if any, and record by which decision."""
    while (found := run.watch.skipped.find(phase, state.g)) is not None:
        end, intervention = found
        index = run.loader.order.spec.phase_index(state.g)
        if intervention is not None:
            # Its record must be durable, and records wait while a checkpoint is pending.
            with run.watchdog.long_work():
                run.saver.wait()
        run.recorder.record_skip(state, index, end, intervention)
        if intervention is not None:
            run.reporter.report_intervention(state, intervention, end=end, count=run.watch.count)
        state = dataclasses.replace(state, g=end)
    return state


def _report(run: Training, state: RunState, interval: Interval) -> RunState:
    """Report the steps of an interval; publish the pending checkpoint if all ranks wrote it."""
    state = run.reporter.report_steps(
        state,
        interval,
        lr=run.optimizer.lr,
        gradient_norm=run.optimizer.gradient_norm(),
        is_written=run.saver.is_written,
    )
    if run.reporter.is_written_by_all:
        with run.watchdog.long_work():
            run.saver.wait()
    return state


def _profile(config: RunConfig) -> AbstractContextManager[Callable[[], None]]:
    """Trace a few steps if the run asks for it; the block calls the given function after each."""
    if not (config.profile and distributed.is_main_rank()):
        return nullcontext(lambda: None)
    from megatron_ettin.training.profile import trace_steps

    return trace_steps(Path(config.run_dir))


def _crosses(every_tokens: int | None, before: RunState, state: RunState) -> bool:
    if every_tokens is None:
        return False
    return before.consumed_tokens // every_tokens < state.consumed_tokens // every_tokens
