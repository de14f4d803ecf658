"""Reports of a run: metrics.jsonl, ledger and console always; W&B and TensorBoard by flags."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_ettin import distributed
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import RunConfig
from megatron_ettin.devices import Device, gpu_called
from megatron_ettin.model.counts import mfu
from megatron_ettin.order import OrderSpec
from megatron_ettin.order.digest import add_digests, format_digest
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.publication import publish_text
from megatron_ettin.training.console import Console, RunProgress, Totals
from megatron_ettin.training.micro_batch import MicroBatch, Report
from megatron_ettin.training.preparation import LANES, ORDER_LANES, TOKEN_LANES, Prepared, StepRange
from megatron_ettin.training.recorder import Recorder
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
    asks_to_stop: bool
    """A rank has asked for the end of the run."""

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return sum(step.tokens for step in self.steps)


class Stopwatch:
    """Seconds that the device spends inside `measure` blocks; only reading waits for the device."""

    def __init__(self) -> None:
        """Start at zero."""
        self._times: list[tuple[Any, Any]] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Add the time of the block."""
        begin = _moment()
        yield
        self._times.append((begin, _moment()))

    def seconds(self) -> float:
        """Return the sum; on a GPU, wait for the last block to end."""
        if not torch.cuda.is_available():
            return sum(end - begin for begin, end in self._times)
        for _, end in self._times[-1:]:
            end.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._times) / 1000.0


def _moment() -> Any:
    """Return the time now, or on a GPU an event that its queue of work stamps with the time."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


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

    def sum_over_ranks(self, *, asks_to_stop: bool = False) -> Summary:
        """Sum over all ranks; all of them call this and get the same result.

        One all-reduce of float64 carries everything (`_slices` names its parts). A digest lane goes
        as two halves of 32 bits, whose sums over fewer than 2^21 ranks are exact in a double. Each
        rank writes its peak of memory to a place of its own, so the sum leaves it as it is.
        """
        lanes = np.array(self._lanes, dtype=np.uint64)  # [steps, LANES]
        peaks = np.zeros(distributed.world_size())
        peaks[distributed.rank()] = peak_memory_bytes()
        low, high = lanes & np.uint64(0xFFFFFFFF), lanes >> np.uint64(32)
        once = [self._flops, asks_to_stop]
        sent = np.concatenate([once, low.ravel(), high.ravel(), peaks], dtype=np.float64)
        # Losses stay on the device until here; this copies the rest to them, and the sum back.
        losses = self._losses if distributed.counts_losses() else torch.zeros_like(self._losses)
        vector = torch.cat([losses, torch.from_numpy(sent).to(losses.device)])
        received = distributed.all_reduce_sum(vector).cpu().numpy()
        sizes = {"low": lanes.size, "high": lanes.size, "peak": len(peaks)}
        at = _slices({"loss": 2, "flops": 1, "stop": 1, **sizes})
        loss_sum, num_scored = received[at["loss"]]
        low, high = (received[at[half]].astype(np.uint64) for half in ("low", "high"))
        return Summary(
            loss=float(loss_sum / num_scored),
            steps=self._steps,
            lanes=(low + (high << np.uint64(32))).reshape(lanes.shape),
            flops=float(received[at["flops"]].item()),
            peak_memory_bytes=int(received[at["peak"]].max()),
            asks_to_stop=bool(received[at["stop"]].item()),
        )


def _slices(sizes: dict[str, int]) -> dict[str, slice]:
    """Return the slice of each part, by name, in a vector that holds parts of `sizes` in turn."""
    ends = itertools.accumulate(sizes.values())
    return {
        name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)
    }


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
        self.is_asked_to_stop = False
        self._recorder = recorder
        self._is_main = distributed.is_main_rank()
        self._trackers: list[Tracker] = []
        self._gpu = _known_gpu()
        self._totals = Totals()
        if not self._is_main:
            return
        folder = RunFolder(Path(config.run_dir))
        self._stop_file = folder.stop
        self._stop_file.unlink(missing_ok=True)
        kept = lines_up_to(folder, state.step)
        publish_text(folder.metrics, "".join(line + "\n" for line in kept))
        for line in kept:
            self._totals.add(json.loads(line))
        self._file = folder.metrics.open("a")
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
        self._file.close()
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)

    def advance_bar(self, tokens: int) -> None:
        """Move the progress bar by a step's tokens."""
        if self._is_main:
            self._console.advance(tokens)

    def report_steps(
        self, state: RunState, interval: Interval, *, lr: float, gradient_norm: float
    ) -> RunState:
        """Record the steps of an interval and write their line.

        `lr` and `gradient_norm` are those of the last step.

        If somebody asks the run to stop, `is_asked_to_stop` is true from here on, on all ranks.

        Returns:
            `state` with the digests of these steps added.

        Raises:
            DivergedError: the loss is not finite. Nothing was recorded or written then.
        """
        asks_to_stop = self._is_main and self._stop_file.exists()
        summary = interval.sum_over_ranks(asks_to_stop=asks_to_stop)
        self.is_asked_to_stop = summary.asks_to_stop
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

    def report_saved(self, folder: Path, seconds: float) -> None:
        """Log that a checkpoint was saved, and the time that training waited for it."""
        if self._is_main:
            logger.info("saved %s in %.1f s", folder, seconds)

    def report_end(self, state: RunState) -> None:
        """Log the totals, the digest of the tokens (equal for twins) and the head of the ledger.

        `verify --head` proves later that the ledger still continues from a head that was noted.
        """
        if self._is_main:
            if self.is_asked_to_stop:
                logger.info("saved and ended at step %d: %s is there", state.step, self._stop_file)
            logger.info("%s: %s", "so far" if self.is_asked_to_stop else "finished", self._totals)
            digest = format_digest(state.token_digest)
            logger.info("%s tokens consumed, digest %s", f"{state.consumed_tokens:,}", digest)
            logger.info("ledger head %s (record %d)", state.ledger_chain, state.ledger_seq)

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._totals.add(record)
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        for tracker in self._trackers:
            tracker.log(record["kind"], numbers, record["step"])


def mfu_field(gpu: Device | None, flops_per_second: float, ranks: int) -> dict[str, float]:
    """Return the field `mfu` of a line: the share of the peak of `ranks` GPUs that was used.

    There is no field if the peak is unknown. A share above 1 is logged as an error and left out,
    for a wrong figure must not end a run. `flops_per_second` is the sum over all ranks.
    """
    if gpu is None:
        return {}
    peak = gpu.peak_flops["bf16"] * ranks
    try:
        return {"mfu": mfu(flops_per_second, peak, f"{ranks} x {gpu.name}")}
    except ValueError as error:
        logger.error("%s", error)
        return {}


def _known_gpu() -> Device | None:
    """Return this rank's GPU if its peak is known, else log that it is not. None on a CPU."""
    device = distributed.device()
    if device.type == "cpu":
        return None
    name = torch.cuda.get_device_name(device)
    gpu = gpu_called(name)
    if gpu is None:
        logger.info("the peak of %s is not known: metrics.jsonl has no mfu", name)
    return gpu


def lines_up_to(folder: RunFolder, step: int) -> list[str]:
    """Return the complete lines of an earlier session that belong to steps up to `step`."""
    return [line for line in folder.metrics_lines() if json.loads(line)["step"] <= step]


def peak_memory_bytes() -> int:
    """Return the largest memory that this rank has needed so far (tools/estimate.py predicts it).

    On a GPU: the peak of torch's allocations, without the CUDA context. On a CPU: the peak of the
    process's resident set, from /proc, because `getrusage` starts from the parent's peak.
    """
    if distributed.device().type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024
    raise OSError("/proc/self/status has no VmHWM")
