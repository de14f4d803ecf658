"""What a run reports: console, progress bar, metrics.jsonl (always), Weights & Biases by flag."""

from __future__ import annotations

import json
import logging
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
from tqdm import tqdm

from megatron_ettin import distributed
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import RunConfig
from megatron_ettin.devices import Device, gpu_called
from megatron_ettin.model.counts import mfu
from megatron_ettin.order.digest import format_digest
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.publication import publish_text
from megatron_ettin.training.micro_batch import MicroBatch
from megatron_ettin.training.preparation import LANES, Prepared, StepRange
from megatron_ettin.training.validation import HeldOutLoss

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """An interval over all ranks."""

    loss: float
    """Mean loss per scored token."""
    steps: list[StepRange]
    lanes: NDArray[np.uint64]
    """[n, 5]: digest lanes of each step."""
    flops: float
    """Operations of the model that all documents took, without padding and recomputation."""
    peak_memory_bytes: int
    """Largest memory of a rank since the run began, over the ranks."""

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return sum(step.tokens for step in self.steps)


class Stopwatch:
    """Seconds that the device spends inside `measure` blocks, without waiting for it until read."""

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
    """Return the time now: as an event of the GPU's own queue of work if there is one."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class Interval:
    """The steps since the last report."""

    def __init__(self) -> None:
        """Start an interval."""
        self.started = time.perf_counter()
        self.optimizer = Stopwatch()
        self._steps: list[StepRange] = []
        self._lanes: list[NDArray[np.uint64]] = []
        self._flops = 0.0
        self._losses = torch.zeros(2, dtype=torch.float64, device=distributed.device())

    def begin(self, step: StepRange) -> None:
        """Begin a step: what is consumed from here on belongs to it."""
        self._steps.append(step)
        self._lanes.append(np.zeros(LANES, dtype=np.uint64))

    def consume(self, batches: Iterator[Prepared]) -> Iterator[MicroBatch]:
        """Yield micro-batches, adding each to the step as it is handed to the model."""
        for batch in batches:
            self._lanes[-1] += batch.lanes
            self._flops += batch.flops
            yield batch.micro_batch

    def add(self, reports: list[dict[str, torch.Tensor]]) -> None:
        """Add a step's losses (none but on the last stage) without waiting for the device."""
        for report in reports:
            self._losses[0] += report["loss_sums"].sum()
            self._losses[1] += report["counts"].sum()

    def summed(self) -> Summary:
        """Sum over all ranks; all of them call this and get the same result.

        The digests ride the all-reduce of the losses: a lane is sent as two halves of 32 bits,
        whose sums over fewer than 2^21 ranks are exact in a double. So do the operations, and the
        peaks of memory, each in the place of its rank.
        """
        lanes = np.array(self._lanes, dtype=np.uint64)
        halves = np.stack([lanes & np.uint64(0xFFFFFFFF), lanes >> np.uint64(32)])
        losses = self._losses if distributed.counts_losses() else torch.zeros_like(self._losses)
        peaks = np.zeros(distributed.world_size())
        peaks[distributed.rank()] = peak_memory_bytes()
        sent = np.concatenate([[self._flops], halves.astype(np.float64).ravel(), peaks])
        together = torch.cat([losses, torch.from_numpy(sent).to(losses.device)])
        received = distributed.all_reduce_sum(together).cpu().numpy()
        low, high = received[3 : -len(peaks)].reshape(2, *lanes.shape).astype(np.uint64)
        return Summary(
            loss=float(received[0] / received[1]),
            steps=self._steps,
            lanes=low + (high << np.uint64(32)),
            flops=float(received[2]),
            peak_memory_bytes=int(received[-len(peaks) :].max()),
        )


class Reporter:
    """Writes on the main rank, and nowhere else."""

    def __init__(
        self, config: RunConfig, config_yaml: str, state: RunState, total_tokens: int
    ) -> None:
        """Open run_dir/metrics.jsonl, dropping lines after `state` (of a run that was cut off)."""
        self._is_main = distributed.is_main_rank()
        self._wandb: Any = None
        self._gpu = _known_gpu()
        if not self._is_main:
            return
        folder = RunFolder(Path(config.run_dir))
        path = folder.metrics
        kept = lines_up_to(folder, state.step)
        publish_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._bar = tqdm(
            total=total_tokens,
            initial=state.consumed_tokens,
            unit="tok",
            unit_scale=True,
            disable=None,
            desc="training",
        )
        if config.logging.wandb:
            import wandb

            self._wandb = wandb.init(
                dir=config.run_dir, name=Path(config.run_dir).name, config={"yaml": config_yaml}
            )

    def __enter__(self) -> Reporter:
        """Return the reporter; it is closed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file, the bar and the W&B run."""
        if not self._is_main:
            return
        self._bar.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def advance(self, tokens: int) -> None:
        """Move the progress bar by a step's tokens."""
        if self._is_main:
            self._bar.update(tokens)

    def training(
        self,
        state: RunState,
        summary: Summary,
        *,
        lr: float,
        seconds: float,
        optimizer_seconds: float,
    ) -> None:
        """Report the steps since the last line, the last rate, and their wall seconds."""
        tokens_per_second = summary.tokens / seconds
        share = mfu_field(self._gpu, summary.flops / seconds, distributed.world_size())
        self._write(
            {
                "kind": "train",
                "step": state.step,
                "g": state.g,
                "phase": state.phase,
                "tokens": state.consumed_tokens,
                "loss": summary.loss,
                "lr": lr,
                "seconds": seconds,
                "tokens_per_second": tokens_per_second,
                **share,
                "optimizer_share": optimizer_seconds / seconds,
                "peak_memory_bytes": summary.peak_memory_bytes,
                "token_digest": format_digest(state.token_digest),
            },
            f"loss {summary.loss:.4f} · lr {lr:.3e} · {tokens_per_second:,.0f} tok/s"
            + "".join(f" · MFU {value:.1%}" for value in share.values()),
        )

    def validation(self, state: RunState, held_out: HeldOutLoss) -> None:
        """Report a held-out loss."""
        self._write(
            {
                "kind": "validation",
                "step": state.step,
                "phase": state.phase,
                "tokens": state.consumed_tokens,
                "heldout_loss": held_out.loss,
                "heldout_standard_error": held_out.standard_error,
                "scored_tokens": held_out.scored_tokens,
            },
            f"held-out loss {held_out.loss:.4f} ± {held_out.standard_error:.4f} "
            f"({held_out.scored_tokens:,} tokens)",
        )

    def end(self, state: RunState) -> None:
        """Say what the run has consumed (a twin's digest is the same), and its ledger's head.

        Who keeps the head can ask `verify --head` for it at any later time.
        """
        if self._is_main:
            digest = format_digest(state.token_digest)
            logger.info("%s tokens consumed, digest %s", f"{state.consumed_tokens:,}", digest)
            logger.info("ledger head %s (record %d)", state.ledger_chain, state.ledger_seq)

    def _write(self, record: dict[str, Any], text: str) -> None:
        if not self._is_main:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        where = f"{record['phase']} step {record['step']} · {record['tokens'] / 1e6:,.2f}M tokens"
        logger.info("%s · %s", where, text)
        if self._wandb is not None:
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
            self._wandb.log(numbers, step=record["step"])


def mfu_field(gpu: Device | None, flops_per_second: float, ranks: int) -> dict[str, float]:
    """Return the field of a line that says how much of the peak of `ranks` GPUs was used.

    No field if the peak is not known, or if more than all of it would have been used: that is
    logged as an error, but a figure ends no run. `flops_per_second` are of all ranks together.
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
    """Return this rank's GPU if its peak is known; say so if it is not. None on a CPU."""
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
    """Return the largest memory of this rank up to now.

    On a GPU: what torch has allocated at once, without the CUDA context. On CPU: the resident set
    of the process. `getrusage` would not do there: a process inherits its parent's value.
    """
    if distributed.device().type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024
    raise OSError("/proc/self/status has no VmHWM")
