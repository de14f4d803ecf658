"""Work of one process of the training benchmark: time our loop and transformers' module.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import throughput
from benchmarks.contenders import (
    Contender,
    Ours,
    Transformers,
    packed_batches,
    padded_batches,
)
from benchmarks.path_cost import path_cost
from benchmarks.throughput import Builder, Measurement
from megatron_ettin import distributed
from megatron_ettin.config import RunConfig, parse_args
from megatron_ettin.data.orders import open_order
from megatron_ettin.devices import gpu_called
from megatron_ettin.model.counts import mfu
from megatron_ettin.training.profile import TRACE_FILE, idle_share, kernel_intervals

if TYPE_CHECKING:
    # Not at run time: training_cells starts the process that imports this module.
    from benchmarks.training_cells import Cell, Figures, Tell

SEQ_LENGTH = 1024
#: Untimed steps with graphs: enough for all usual shapes to be captured. Without them one does.
GRAPHS_WARM_UP_STEPS = 8
#: Documents of a padded batch on a CPU; on a GPU as many as a packed one has rows.
PADDED_DOCUMENTS = 16
#: More than any measurement takes, so that no benchmark reaches the end of its phase.
TRAIN_TOKENS = 2**30

Configured = Callable[[int], RunConfig]
"""Makes a run of the cell whose micro-batches have so many slots."""


def measure(cell: Cell, tell: Tell) -> Figures:
    """Measure one cell; tell each figure as soon as it exists, and return all of them."""
    figures: Figures = {}

    def found(some: Figures) -> None:
        figures.update(some)
        tell(some)

    with tempfile.TemporaryDirectory(prefix="bench_train.") as folder:
        configured = partial(_configuration, cell, Path(folder))
        with distributed.process_groups(configured(cell.micro_batch_slots).hardware):
            in_turns = throughput.side_by_side if cell.device == "cpu" else throughput.one_by_one
            in_turns(
                _contenders(cell, configured),
                micro_batch_slots=cell.micro_batch_slots,
                rounds=cell.rounds,
                warm_up_steps=GRAPHS_WARM_UP_STEPS if cell.cuda_graphs else 1,
                at_end=lambda contender: found(_profile(cell, contender)),
                each=lambda name, measurement: found(_figures(name, measurement)),
            )
            if cell.path_cost:
                parts = path_cost(configured(cell.micro_batch_slots), rounds=cell.rounds)
                found({"path_cost": {part: seconds.share for part, seconds in parts.items()}})
    return figures


def _configuration(cell: Cell, folder: Path, slots: int) -> RunConfig:
    """Return a run of the cell with micro-batches of `slots`, in a folder of its own."""
    rows = cell.step_slots // SEQ_LENGTH
    phase = f"name: pretrain, train_tokens: {TRAIN_TOKENS}, seq_length: {SEQ_LENGTH}"
    return parse_args(
        [
            f"--config=examples/model/{cell.model}.yaml",
            f"--config=examples/objective/{cell.objective}.yaml",
            f"--config={cell.data}",
            f"--phases=[{{{phase}, global_batch_size: {rows}}}]",
            "--data.validation=[]",
            f"--hardware.micro_batch_tokens={slots}",
            f"--hardware.precision={cell.precision}",
            f"--hardware.cuda_graphs={str(cell.cuda_graphs).lower()}",
            f"--hardware.threads_per_rank={cell.threads}",
            f"--run_dir={tempfile.mkdtemp(dir=folder)}/run",
        ]
    )


def _contenders(cell: Cell, configured: Configured) -> dict[str, Builder]:
    """Return the contenders of the cell by name; ours is first."""

    def packed(slots: int, sparse: bool = False) -> Transformers:
        config = configured(slots)
        batches = packed_batches(config, open_order(config))
        count = cell.step_slots // slots
        return Transformers(config, batches, sparse=sparse, micro_batches=count)

    def padded(slots: int, by_length: bool = False, attention: str = "sdpa") -> Transformers:
        config = configured(slots)
        documents = PADDED_DOCUMENTS if cell.device == "cpu" else slots // SEQ_LENGTH
        ids = open_order(config).ids
        batches = padded_batches(config, ids, batch_size=documents, by_length=by_length)
        return Transformers(
            config,
            batches,
            sparse=is_encoder,
            micro_batches=cell.step_slots // slots,
            attention=attention,
        )

    is_encoder = cell.objective == "mlm"
    builders: dict[str, Builder] = {"ours": lambda slots: Ours(configured(slots))}
    # transformers' module has no fp8.
    if not cell.peers or cell.precision == "fp8":
        return builders
    builders["peer_packed"] = packed
    if is_encoder:
        builders["peer_packed_sparse"] = partial(packed, sparse=True)
    builders["peer_padded"] = padded
    builders["peer_padded_by_length"] = partial(padded, by_length=True)
    # transformers uses the package flash-attn.
    if cell.device == "cuda" and find_spec("flash_attn") is not None:
        builders["peer_padded_flash"] = partial(padded, attention="flash_attention_2")
    return builders


def _profile(cell: Cell, contender: Contender) -> Figures:
    """Trace a micro-batch of ours if the cell asks for it; on a GPU return its idle share."""
    if cell.profile is None or not isinstance(contender, Ours):
        return {}
    folder = cell.profile / f"{cell.model}_{cell.objective}_{cell.precision}"
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    contender.trace(folder)
    intervals = kernel_intervals(folder / TRACE_FILE)
    return {"ours_idle_share": idle_share(intervals)} if len(intervals) else {}


def _figures(name: str, measurement: Measurement) -> Figures:
    """Return the figures of a contender by the names that they have in the JSON object."""
    figures: Figures = {
        f"{name}_tokens_per_s": measurement.tokens_per_s,
        f"{name}_slowest_fastest": measurement.spread,
        f"{name}_fill": measurement.fill,
    }
    if measurement.peak_memory_bytes is not None:
        figures[f"{name}_peak_memory_bytes"] = measurement.peak_memory_bytes
        figures[f"{name}_micro_batch_slots"] = measurement.micro_batch_slots
    gpu = gpu_called(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if gpu is not None and measurement.flops_per_s is not None:
        # A share of the bf16 peak in every precision.
        peak = gpu.peak_flops["bf16"]
        figures[f"{name}_mfu"] = mfu(measurement.flops_per_s, peak, gpu.name)
    return figures
