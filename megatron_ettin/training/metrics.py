"""Reports of a run: metrics.jsonl, ledger and console always; W&B and TensorBoard by flags."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_ettin import distributed
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import RunConfig
from megatron_ettin.order import OrderSpec
from megatron_ettin.order.digest import add_digests, format_digest
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.training.console import Console, RunProgress, Totals
from megatron_ettin.training.device_figures import known_gpu, mfu_field, peak_memory_bytes
from megatron_ettin.training.kept_lines import cut_metrics
from megatron_ettin.training.late_writes import LateWrites, LineFile
from megatron_ettin.training.micro_batch import MicroBatch, Report
from megatron_ettin.training.preparation import LANES, ORDER_LANES, TOKEN_LANES, Prepared, StepRange
from megatron_ettin.training.rank_times import RankTimes
from megatron_ettin.training.recorder import Recorder
from megatron_ettin.training.stopwatch import Stopwatch
from megatron_ettin.training.trackers import Tracker, open_trackers
from megatron_ettin.training.validation import HeldOutLoss

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Sums of an interval over all ranks."""

    loss: float
    """Mean loss per scored token; of masked diffusion, its bound per token."""
    steps: list[StepRange]
    lanes: NDArray[np.uint64]
    """[n, LANES] digest lanes of each of the n steps."""
    flops: float
    """Operations of the model for all documents, without padding and recomputation."""
    peak_memory_bytes: int
    """Largest memory that any rank has needed since the run began."""
    is_written_by_all: bool
    """All ranks have written their part of the pending checkpoint."""
    own_seconds: NDArray[np.float64]
    """[ranks] time of each rank's own part of a step, as the rank has measured it."""

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return sum(step.tokens for step in self.steps)


class Interval:
    """Steps since the last report, as this rank has seen them."""

    def __init__(self) -> None:
        """Start an interval."""
        self.started = time.perf_counter()
        self.optimizer = Stopwatch()
        self._steps: list[StepRange] = []
        self._lanes: list[NDArray[np.uint64]] = []
        self._flops = 0.0
        self._losses = torch.zeros(2, dtype=torch.float64, device=distributed.device())

    def begin_step(self, step: StepRange) -> None:
        """Begin a step: micro-batches that are consumed from here on belong to it."""
        self._steps.append(step)
        self._lanes.append(np.zeros(LANES, dtype=np.uint64))

    def consume(self, batches: Iterator[Prepared]) -> Iterator[MicroBatch]:
        """Yield micro-batches, and add each to the step when the model takes it."""
        for batch in batches:
            self._lanes[-1] += batch.lanes
            self._flops += batch.flops
            yield batch.micro_batch

    def add_losses(self, reports: list[Report]) -> None:
        """Add a step's losses, without waiting for the device; only the last stage has any."""
        for report in reports:
            self._losses[0] += report["loss_sums"].sum()
            self._losses[1] += report["counts"].sum()

    def sum_over_ranks(self, own_seconds: float = 0.0, *, is_written: bool = False) -> Summary:
        """Sum over all ranks; all of them call this and get the same result.

        One all-reduce of float64 carries everything (`_slices` names its parts). A digest lane goes
        as two halves of 32 bits, whose sums over fewer than 2^21 ranks are exact in a double. Each
        rank writes its peak of memory and its own time to places of its own, so the sum leaves
        them as they are.
        """
        lanes = np.array(self._lanes, dtype=np.uint64)  # [steps, LANES]
        own = np.zeros((2, distributed.world_size()))
        own[:, distributed.rank()] = peak_memory_bytes(), own_seconds
        low, high = lanes & np.uint64(0xFFFFFFFF), lanes >> np.uint64(32)
        sent = np.concatenate(
            [[self._flops, is_written], low.ravel(), high.ravel(), own.ravel()], dtype=np.float64
        )
        # Losses stay on the device until here; this copies the rest to them, and the sum back.
        losses = self._losses if distributed.counts_losses() else torch.zeros_like(self._losses)
        vector = torch.cat([losses, torch.from_numpy(sent).to(losses.device)])
        received = distributed.all_reduce_sum(vector).cpu().numpy()
        sizes = {"low": lanes.size, "high": lanes.size, "peak": own.shape[1]}
        at = _slices({"loss": 2, "flops": 1, "written": 1, **sizes, "seconds": own.shape[1]})
        loss_sum, num_scored = received[at["loss"]]
        low, high = (received[at[half]].astype(np.uint64) for half in ("low", "high"))
        return Summary(
            loss=float(loss_sum / num_scored),
            steps=self._steps,
            lanes=(low + (high << np.uint64(32))).reshape(lanes.shape),
            flops=float(received[at["flops"]].item()),
            peak_memory_bytes=int(received[at["peak"]].max()),
            is_written_by_all=received[at["written"]].item() == distributed.world_size(),
            own_seconds=received[at["seconds"]],
        )


def _slices(sizes: dict[str, int]) -> dict[str, slice]:
    """Return the slice of each part, by name, in a vector that holds parts of `sizes` in turn."""
    ends = itertools.accumulate(sizes.values())
    return {
        name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)
    }


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


class DivergedError(ValueError):
    """The loss is not finite; nothing was saved after it."""


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
        self._totals = cut_metrics(folder, state.step)
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
                f"from the last checkpoint with a lower optimizer.lr"
            )
        self._recorder.record_steps(summary.steps, summary.lanes)
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

    def report_saved(self, state: RunState, saved: SavedCheckpoint) -> None:
        """Report the checkpoint of `state`; later steps may have lines already."""
        if not self._is_main:
            return
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
        logger.info(
            "saved %s in %.1f s (training waited %.1f s)",
            *(saved.folder, saved.seconds, saved.stall_seconds),
        )

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

    def report_end(self, state: RunState, *, stopped_by: str = "") -> None:
        """Log the totals, the digest of the tokens (equal for twins) and the head of the ledger.

        `stopped_by` says who asked for the end; empty for a run that is complete.

        `verify --head` proves later that the ledger still continues from a head that was noted.
        """
        if self._is_main:
            if stopped_by:
                logger.info("saved and ended at step %d: %s", state.step, stopped_by)
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
