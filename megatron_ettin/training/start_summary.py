"""The report at the start of a run: model, layout, phases, epochs, checkpoints, disk, folders.

It is logged once, on the main rank, when all that it states is known and before the model is built.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_ettin import distributed
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import PhaseConfig, RunConfig
from megatron_ettin.data.step_occupancy import advise, step_occupancy
from megatron_ettin.devices import GIB
from megatron_ettin.model.backend import choose_backend
from megatron_ettin.model.counts import parameters
from megatron_ettin.objectives import attentions
from megatron_ettin.order import PhaseSpec, PoolSpec, SampleOrder
from megatron_ettin.order.steps import count_steps
from megatron_ettin.text_table import text_facts
from megatron_ettin.training.host_report import Hosts

logger = logging.getLogger(__name__)

#: Clocks that differ by more are a warning. Nothing that is computed depends on them.
LARGEST_CLOCK_SECONDS = 5.0
#: Error of a sum of epochs.
ROUNDING = 1e-9
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class SourceReading:
    """Epochs of a source in a phase."""

    source: str
    epochs: float
    """Rows that the phase draws, by the rows of its pool."""
    times_read: float
    """Epochs over the documents read most often, at the end of the phase, in all phases."""

    def __str__(self) -> str:
        """Say it in words; documents that were read before are named."""
        before = self.times_read - self.epochs
        return f"{self.source} {self.epochs:.2f}" + (
            f" ({self.times_read:.2f} with earlier phases)" if before > 0.005 else ""
        )


def log_summary(config: RunConfig, order: SampleOrder, state: RunState, hosts: Hosts) -> None:
    """Log the report of a run that starts from `state`; what deserves care as warnings."""
    if not distributed.is_main_rank():
        return
    facts = [
        (logging.INFO, "run", _run(config, order, state)),
        (logging.INFO, "model", _model(config)),
        _hosts(hosts),
        (logging.INFO, "layout", _layout(config, hosts)),
        (logging.INFO, "software", ", ".join(f"{k} {v}" for k, v in hosts.versions.items())),
        *_phases(config, order, hosts),
        *_repeats(order),
        (logging.INFO, "held out", _held_out(config)),
        _checkpoints(hosts),
    ]
    lines = text_facts([(name, text) for _, name, text in facts])
    for (level, _, _), line in zip(facts, lines, strict=True):
        logger.log(level, "%s", line)


def _run(config: RunConfig, order: SampleOrder, state: RunState) -> str:
    done = state.g / order.num_rows
    begin = f"goes on after step {state.step:,} ({done:.1%})" if state.step else "new"
    trackers = [name for name in ("wandb", "tensorboard") if getattr(config.logging, name)]
    return (
        f"{config.run_dir}: {begin}; order {order.spec.order_id[:12]}; checkpoints, ledger, "
        f"metrics.jsonl{''.join(f', {name}' for name in trackers)} go there"
    )


def _model(config: RunConfig) -> str:
    counted, model = parameters(config.model), config.model
    directions = attentions(config.objective, [phase.name for phase in config.phases])
    return (
        f"{type(config.objective).__name__} ({' and '.join(directions)}), {model.num_layers} "
        f"layers of width {model.hidden_size}; {counted.total:,} parameters: embedding "
        f"{counted.embedding:,}, layers {counted.layers:,}, head {counted.head:,}"
    )


def _hosts(hosts: Hosts) -> tuple[int, str, str]:
    spread = hosts.clock_spread_seconds
    return (
        logging.INFO if spread <= LARGEST_CLOCK_SECONDS else logging.WARNING,
        "hosts",
        f"{len(hosts.ranks)}: {', '.join(hosts.ranks)}; clocks within {spread:.3f} s; "
        f"{hosts.num_corpus_files} corpus files, alike on all",
    )


def _layout(config: RunConfig, hosts: Hosts) -> str:
    hardware = config.hardware
    backend = choose_backend(config.model, hardware).replace("_", " ")
    device = distributed.device().type
    threads = hardware.threads_per_rank or os.environ.get("OMP_NUM_THREADS")
    on_cpu = f" (threads of a rank: {threads})" if device == "cpu" and threads else ""
    return (
        f"tensor {hardware.tensor_parallel_size} x pipeline {hardware.pipeline_parallel_size} x "
        f"context {hardware.context_parallel_size} x data "
        f"{hosts.num_ranks // hardware.model_ranks}; {hardware.precision}, layers by {backend}, "
        f"on {device}{on_cpu}"
    )


def _phases(config: RunConfig, order: SampleOrder, hosts: Hosts) -> Iterator[tuple[int, str, str]]:
    """Yield a line for each phase, and lines with settings that lose less time, if much is lost."""
    readings = source_readings(order)
    steps = count_steps(order, config.phases, config.data.skip_rows)
    advice = advise(config.phases, config.hardware, hosts.num_ranks)
    for index, (phase, settings) in enumerate(zip(order.spec.phases, config.phases, strict=True)):
        occupancy = step_occupancy(settings, config.hardware, hosts.num_ranks)
        epochs = ", ".join(map(str, readings[index]))
        text = f"{_phase(phase, settings, steps[index])}: {occupancy}; epochs: {epochs}"
        yield logging.INFO, f"phase {phase.name}", text
        yield from (
            (logging.WARNING, "  instead", text) for name, text in advice if name == phase.name
        )
    yield from ((logging.WARNING, "instead", text) for name, text in advice if not name)


def _phase(phase: PhaseSpec, settings: PhaseConfig, steps: int) -> str:
    ramp = settings.batch_ramp_start
    grows = f"{ramp:,} to " if ramp is not None else ""
    return (
        f"{settings.train_tokens:,} tokens, {phase.num_rows:,} rows of {phase.seq_length:,}, "
        f"{steps:,} steps of {grows}{settings.global_batch_size:,} rows"
    )


def _repeats(order: SampleOrder) -> Iterator[tuple[int, str, str]]:
    """Yield a warning if documents are read more than once."""
    most: dict[str, float] = {}
    for readings in source_readings(order):
        for reading in readings:
            most[reading.source] = max(most.get(reading.source, 0.0), reading.times_read)
    repeated = [
        f"{source} {times:.2f} epochs" for source, times in most.items() if times > 1.0 + ROUNDING
    ]
    if repeated:
        limit = "data.sources.NAME.max_epochs sets a limit"
        yield (
            logging.WARNING,
            "repeats",
            f"documents are read again: {', '.join(repeated)}; {limit}",
        )


def _held_out(config: RunConfig) -> str:
    if not config.data.validation:
        return "none"
    settings = config.validation
    every = f"every {settings.every_tokens:,} tokens and " if settings.every_tokens else ""
    return (
        f"{settings.num_rows:,} rows of {settings.seq_length:,} from "
        f"{', '.join(map(str, config.data.validation))}, {every}at the end"
    )


def _checkpoints(hosts: Hosts) -> tuple[int, str, str]:
    needed = hosts.num_checkpoints * hosts.checkpoint_bytes
    return (
        logging.INFO if needed <= hosts.free_bytes else logging.WARNING,
        "checkpoints",
        f"at most {hosts.num_checkpoints:,} to come of {_size(hosts.checkpoint_bytes)}: "
        f"{_size(needed)}; {hosts.folder} has {_size(hosts.free_bytes)} free",
    )


def _size(count: int) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / MIB:,.1f} MiB"


def source_readings(order: SampleOrder) -> list[list[SourceReading]]:
    """Return how often each phase reads each of its sources, by phase."""
    counts = iter([drawn for _, drawn in order.drawn_before(order.num_rows)])
    latest: dict[tuple[object, ...], tuple[PoolSpec, float]] = {}
    found = []
    for phase in order.spec.phases:
        readings = []
        for pool, drawn in [(pool, next(counts)) for pool in phase.pools]:
            key = (
                *(pool.source, pool.first_document, pool.end_document),
                *(phase.seq_length, phase.pack, phase.max_segments_per_row),
            )
            latest[key] = pool, drawn / pool.rows
            readings.append(
                SourceReading(
                    source=pool.source,
                    epochs=(drawn - pool.drawn) / pool.rows,
                    times_read=_most_epochs(pool, list(latest.values())),
                )
            )
        found.append(readings)
    return found


def _most_epochs(pool: PoolSpec, read: Sequence[tuple[PoolSpec, float]]) -> float:
    """Return the epochs over those documents of `pool` that were read most, of all pools `read`."""
    others = [(other, epochs) for other, epochs in read if other.source == pool.source]
    # Where pools overlap, some pool's first document is read most.
    firsts = {max(other.first_document, pool.first_document) for other, _ in others}
    return max(
        sum(epochs for other, epochs in others if other.first_document <= n < other.end_document)
        for n in firsts
        if n < pool.end_document
    )
