"""Reports of a run: metrics.jsonl, ledger and console always; W&B and TensorBoard by flags."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_ettin import distributed
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import RunConfig
from megatron_ettin.order import OrderSpec
from megatron_ettin.order.digest import add_digests, format_digest
from megatron_ettin.order.interventions import Intervention
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.training.console import Console, RunProgress, Totals
from megatron_ettin.training.device_figures import known_gpu, mfu_field
from megatron_ettin.training.interval import Interval, Summary
from megatron_ettin.training.kept_lines import cut_metrics
from megatron_ettin.training.late_writes import LateWrites, LineFile
from megatron_ettin.training.preparation import ORDER_LANES, TOKEN_LANES
from megatron_ettin.training.rank_times import RankTimes
from megatron_ettin.training.recorder import Recorder
from megatron_ettin.training.trackers import Tracker, open_trackers
from megatron_ettin.training.trouble import DivergedError
from megatron_ettin.training.validation import HeldOutLoss

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint that was published, and its cost."""

    folder: Path
    num_bytes: int
    """Bytes of the tensors of all ranks."""
    stall_seconds: float
    """Time that training waited for it."""
    seconds: float
    """Time from the save to the publication."""


class Reporter:
    """Reports steps to the ledger, metrics.jsonl, console, W&B and TensorBoard.

    All ranks call it; the main rank writes.
    """

    def __init__(
        self, config: RunConfig, spec: OrderSpec, state: RunState, recorder: Recorder
    ) -> None:
        """Open run_dir/metrics.jsonl, and drop lines after `state`, of an interrupted run.

        A file that asked an earlier session to stop goes.
        """
        self.is_written_by_all = False
        self._step = state.step
        self._recorder = recorder
        self._is_main = distributed.is_main_rank()
        self._trackers: list[Tracker] = []
        self._gpu = known_gpu()
        self._totals = Totals()
        self.times = RankTimes()
        if not self._is_main:
            return
        folder = RunFolder(Path(config.run_dir))
        folder.stop.unlink(missing_ok=True)
        self._totals = cut_metrics(folder, state)
        self._file = LineFile(folder.metrics)
        self._late = LateWrites(folder.metrics)
        self._trackers = open_trackers(config, spec.order_id, state)
        self._console = Console(RunProgress(config.phases, spec.phases), state.consumed_tokens)

    def __enter__(self) -> Reporter:
        """Return the reporter; it is closed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file, the bar, the W&B run and TensorBoard's file."""
        if not self._is_main:
            return
        self._console.close()
        with suppress(OSError):  # steps after the last checkpoint are repeated, with their lines
            self._late.settle()
        self._file.close()
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)

    def advance_bar(self, tokens: int) -> None:
        """Move the progress bar by a step's tokens."""
        if self._is_main:
            self._console.advance(tokens)

    def report_steps(
        self,
        state: RunState,
        interval: Interval,
        *,
        lr: float,
        gradient_norm: float,
        is_written: bool,
    ) -> RunState:
        """Record the steps of an interval and write their line.

        `lr` and `gradient_norm` are those of the last step. `is_written`: this rank has written its
        part of the pending checkpoint; `is_written_by_all` then says whether all ranks have.

        Returns:
            `state` with the digests of these steps added.

        Raises:
            DivergedError: the loss is not finite. Nothing was recorded or written then.
        """
        summary = interval.sum_over_ranks(self.times.take_mean(), is_written=is_written)
        self.is_written_by_all = summary.is_written_by_all
        if not math.isfinite(summary.loss):
            raise DivergedError(
                f"the loss is {summary.loss} at step {state.step} (rows up to {state.g}): resume "
                f"from the last checkpoint with a lower optimizer.lr, or with trouble.on_nan skip "
                f"or rewind"
            )
        self._recorder.record_steps(summary.steps, summary.lanes, summary.row_losses)
        lanes = summary.lanes.sum(axis=0, dtype=np.uint64)
        state = dataclasses.replace(
            state,
            order_digest=add_digests(state.order_digest, lanes[ORDER_LANES].tolist()),
            token_digest=add_digests(state.token_digest, lanes[TOKEN_LANES].tolist()),
        )
        self._write_steps(
            state,
            summary,
            lr=lr,
            gradient_norm=gradient_norm,
            started=interval.started,
            now=time.perf_counter(),
            optimizer_seconds=interval.optimizer.seconds(),
        )
        return state

    def _write_steps(
        self,
        state: RunState,
        summary: Summary,
        *,
        lr: float,
        gradient_norm: float,
        started: float,
        now: float,
        optimizer_seconds: float,
    ) -> None:
        seconds = now - started
        tokens_per_second = summary.tokens / seconds
        share = mfu_field(self._gpu, summary.flops / seconds, distributed.world_size())
        record = {
            "kind": "train",
            "step": state.step,
            "g": state.g,
            "phase": state.phase,
            "tokens": state.consumed_tokens,
            "loss": summary.loss,
            "lr": lr,
            "grad_norm": gradient_norm,
            "seconds": seconds,
            "tokens_per_second": tokens_per_second,
            **share,
            "optimizer_share": optimizer_seconds / seconds,
            "peak_memory_bytes": summary.peak_memory_bytes,
            **self.times.describe(summary.own_seconds),
            "token_digest": format_digest(state.token_digest),
        }
        if self._is_main:
            self._write(record)
            self._console.report_steps(
                state, record, tokens=summary.tokens, started=started, now=now
            )

    def report_validation(self, state: RunState, held_out: HeldOutLoss) -> None:
        """Report a held-out loss."""
        if not self._is_main:
            return
        record = {
            "kind": "validation",
            "step": state.step,
            "phase": state.phase,
            "tokens": state.consumed_tokens,
            "heldout_loss": held_out.loss,
            "heldout_standard_error": held_out.standard_error,
            "scored_tokens": held_out.scored_tokens,
        }
        self._write(record)
        self._console.report(
            state,
            f"held-out loss {held_out.loss:.4f} ± {held_out.standard_error:.4f} "
            f"({held_out.scored_tokens:,} tokens)",
        )

    def report_intervention(
        self, state: RunState, intervention: Intervention, *, end: int, count: str
    ) -> None:
        """Report that rows [state.g, end) are left out by a decision, the `count`-th."""
        if not self._is_main:
            return
        record = {
            "kind": intervention.action,
            "step": state.step,
            "phase": state.phase,
            "tokens": state.consumed_tokens,
            "reason": intervention.reason,
            "rows": [state.g, end],
            "skipped_step": intervention.step,
            "skipped_loss": intervention.loss,
            "skipped_grad_norm": intervention.gradient_norm,
            "skipped_z": intervention.z,
        }
        self._write(record)
        logger.warning("%s (intervention %s)", intervention, count)

    def report_saved(self, state: RunState, saved: SavedCheckpoint) -> None:
        """Write the line of the checkpoint of `state`; later steps may have lines already.

        For the main rank alone.
        """
        record = {
            "kind": "checkpoint",
            "step": state.step,
            "phase": state.phase,
            "tokens": state.consumed_tokens,
            "save_stall_seconds": saved.stall_seconds,
            "save_seconds": saved.seconds,
            "bytes": saved.num_bytes,
        }
        self._write(record)

    def write_durably(self, report: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl that no tracker gets; for the main rank alone.

        Raises:
            OSError: the disk refuses.
        """
        self._late.settle()
        self._file.append(json.dumps(report))

    def settle(self) -> None:
        """Make the lines durable that a full disk has refused: a checkpoint undoes none of them.

        Raises:
            OSError: on the main rank, if the disk still refuses them.
        """
        if self._is_main:
            self._late.settle()

    def report_end(
        self, state: RunState, *, stopped_by: str = "", stop_seconds: float = 0.0
    ) -> None:
        """Log the totals, the digest of the tokens (equal for twins) and the head of the ledger.

        `stopped_by` says who asked for the end, `stop_seconds` how long ago; empty for a run that
        is complete.

        `verify --head` proves later that the ledger still continues from a head that was noted.
        """
        if self._is_main:
            if stopped_by:
                logger.info(
                    "saved and ended at step %d: %s, %.1f s ago",
                    state.step,
                    stopped_by,
                    stop_seconds,
                )
            logger.info("%s: %s", "so far" if stopped_by else "finished", self._totals)
            digest = format_digest(state.token_digest)
            logger.info("%s tokens consumed, digest %s", f"{state.consumed_tokens:,}", digest)
            logger.info("ledger head %s (record %d)", state.ledger_chain, state.ledger_seq)

    def _write(self, record: dict[str, Any]) -> None:
        self._late.write(partial(self._file.append, json.dumps(record)))
        self._totals.add(record)
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        if record["step"] < self._step:
            # W&B ignores a step before the last one, which a checkpoint's may be; a later step gets
            # its line, and keeps its own place.
            numbers = {k: v for k, v in numbers.items() if k not in ("step", "tokens")}
        self._step = max(self._step, record["step"])
        for tracker in self._trackers:
            tracker.log(record["kind"], numbers, self._step)
