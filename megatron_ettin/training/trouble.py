"""Watch over the steps: find one that goes wrong before its update, and decide what to leave out.

A decision is a function of the last checkpoint and of the rows since then, and it is in the ledger
before anything follows from it (docs/decisions/0015-skips-and-rewinds.md).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Literal, assert_never

import torch

from megatron_ettin import distributed
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import TroubleConfig
from megatron_ettin.order import OrderSpec
from megatron_ettin.order.interventions import Intervention, Reason, SkippedRows
from megatron_ettin.order.spread import middle_and_spread
from megatron_ettin.training.micro_batch import Report
from megatron_ettin.training.optimizer import Optimizer
from megatron_ettin.training.preparation import StepRange


class DivergedError(ValueError):
    """A loss is not finite, or a spike, and the run may not go on; nothing was saved after it."""


class TroubledStepError(Exception):
    """A step went wrong before its update: nothing of it counts, and its rows are left out."""

    def __init__(self, intervention: Intervention) -> None:
        """Take the decision, which is nowhere recorded yet."""
        super().__init__(str(intervention))
        self.intervention = intervention


def robust_z(losses: Sequence[float], loss: float) -> float | None:
    """Return the distance of `loss` from the median of `losses` in robust standard deviations.

    None if they have no spread: more than half of them are equal.
    """
    middle, spread = middle_and_spread(losses)
    return (loss - middle) / spread if spread > 0.0 else None


class Watch:
    """Judge of the steps of a session; all ranks hold the same and come to the same verdict."""

    def __init__(
        self,
        config: TroubleConfig,
        skip_rows: Sequence[tuple[int, int]],
        spec: OrderSpec,
        interventions: Sequence[Intervention],
        *,
        saved_step: int,
    ) -> None:
        """Take the settings, `data.skip_rows`, the order, and the decisions that the run made.

        `saved_step` is the step that the run starts from: 0, or that of a checkpoint.
        """
        self.skipped = SkippedRows(skip_rows, interventions, spec)
        self.goes_back = False
        """The last decision returns the run to its last checkpoint."""
        self.saved_step = saved_step
        """Step of the last checkpoint. A step that is left out changes nothing that it holds."""
        self._config = config
        self._phase_ids = spec.phase_ids()
        self._interventions = list(interventions)
        # First rows of the steps taken since the last checkpoint, as many as a rewind leaves out.
        self._begins: deque[int] = deque(maxlen=config.rewind_steps - 1)

    def examine(
        self, step: StepRange, state: RunState, reports: Sequence[Report], optimizer: Optimizer
    ) -> tuple[float, ...]:
        """Look at a step between its passes and its update; return the window of losses after it.

        All ranks call it and come to the same answer. Unless the settings ask for it, it does
        nothing; else it waits for the device and reads three numbers back.

        Raises:
            TroubledStepError: the step must not be taken.
            DivergedError: the settings say that the run ends here, or do not let it intervene
                once more.
        """
        if not self._config.is_on:
            return state.recent_losses
        loss, norm = measure(reports, optimizer)
        window = state.recent_losses
        is_full = len(window) == self._config.window_steps
        z = robust_z(window, loss) if is_full and math.isfinite(loss) else None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._decide("trouble.on_nan", self._config.on_nan, step, loss, norm, z)
        elif self._config.seeks_spikes and z is not None and z >= self._config.spike_z:
            self._decide("trouble.on_spike", self._config.on_spike, step, loss, norm, z)
        self._begins.append(step.g_begin)
        if not self._config.seeks_spikes:
            return ()
        return (*window, loss)[-self._config.window_steps :]

    def _decide(
        self,
        reason: Reason,
        action: Literal["off", "stop", "skip", "rewind"],
        step: StepRange,
        loss: float,
        norm: float,
        z: float | None,
    ) -> None:
        """Raise what the settings answer to a step that went wrong."""
        match action:
            case "off":
                return
            case "stop":
                raise DivergedError(
                    f"the loss is {loss}, the gradient norm {norm} at step {step.step} (rows up to "
                    f"{step.g_end}), and {reason} is stop: resume from the last checkpoint with a "
                    f"lower optimizer.lr, or with {reason} skip or rewind"
                )
            case "skip":
                first = step.g_begin
            case "rewind":
                first = min([step.g_begin, *self._begins])
            case _:
                assert_never(action)
        intervention = Intervention(
            reason=reason,
            action=action,
            rows=(first, step.g_end),
            phase_id=self._phase_ids[step.phase],
            step=step.step,
            loss=loss if math.isfinite(loss) else None,
            gradient_norm=norm if math.isfinite(norm) else None,
            z=z,
        )
        if len(self._interventions) >= self._config.max_interventions:
            told = "".join(f"\n  {each}" for each in self._interventions)
            raise DivergedError(
                f"{intervention}: no more, for trouble.max_interventions is "
                f"{self._config.max_interventions}. Lower optimizer.lr, look at these rows (docs/"
                f"queries.md), or allow more. So far:{told or ' none'}"
            )
        raise TroubledStepError(intervention)

    def take(self, intervention: Intervention) -> None:
        """Let a decision count from here on."""
        self._interventions.append(intervention)
        self.skipped.add(intervention)
        self.goes_back = intervention.action == "rewind"

    def begin_after_checkpoint(self, step: int) -> None:
        """Forget the steps that a checkpoint after `step` holds: a rewind cannot undo them."""
        self.saved_step = step
        self._begins.clear()

    @property
    def count(self) -> str:
        """Tell how many decisions the run has made, and how many it may."""
        return f"{len(self._interventions)} of at most {self._config.max_interventions}"


def measure(reports: Sequence[Report], optimizer: Optimizer) -> tuple[float, float]:
    """Return a step's mean loss and gradient norm over all ranks; the same bits on each of them.

    It waits for the device. Only ranks of the last stage have losses.
    """
    norm = optimizer.measure_gradient_norm()
    sums = torch.zeros(2, dtype=torch.float64, device=distributed.device())
    if distributed.counts_losses():
        for report in reports:
            sums[0] += report["loss_sums"].sum()
            sums[1] += report["counts"].sum()
    loss_sum, scored = distributed.all_reduce_sum(sums).tolist()
    loss = loss_sum / scored if scored else math.nan
    # Ranks may sum in another order: one of them speaks for all.
    loss, norm = distributed.broadcast_values(
        torch.tensor([loss, norm], dtype=torch.float64, device=distributed.device())
    ).tolist()
    return loss, norm
