"""Measure training beside transformers' own module: the same model, text and precision.

python tools/bench_train.py --device cpu --models nano 17m --json

The text is the quickstart's: `make quickstart QUICKSTART_SHORT=1` makes it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

SIZES = ("nano", "17m", "32m", "68m", "150m", "400m", "1b")
SEQ_LENGTH = 1024
#: Slots of a step and of a micro-batch: on a CPU one micro-batch, on a GPU several.
STEP_SLOTS = {"cpu": 4096, "cuda": 2**19}
MICRO_BATCH_SLOTS = {"cpu": 4096, "cuda": 2**16}
#: Documents of a padded batch on a CPU; on a GPU as many as a packed one has rows.
PADDED_DOCUMENTS = 16
#: More than any measurement takes: the corpus is gone through again and again.
TRAIN_TOKENS = 2**30
#: So that freed memory is kept: what is measured is not the system's handing out of pages.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}

Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one process measures."""

    model: str
    objective: str
    precision: str
    device: str
    data: Path
    rounds: int
    micro_batch_slots: int
    cuda_graphs: bool
    peers: bool
    path_cost: bool
    profile: Path | None
    threads: int


def main() -> None:
    """Measure every cell in a process of its own and report."""
    args = parse_arguments()
    os.environ.update(ALLOCATOR)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cells = [
        Cell(
            model=model,
            objective=objective,
            precision=precision,
            device=args.device,
            data=args.data,
            rounds=args.rounds,
            micro_batch_slots=args.micro_batch_tokens or MICRO_BATCH_SLOTS[args.device],
            cuda_graphs=args.cuda_graphs,
            peers=not args.no_peers,
            path_cost=args.path_cost,
            profile=args.profile,
            threads=args.threads,
        )
        for model in args.models
        for objective in args.objectives
        for precision in args.precisions
    ]
    report: dict[str, dict[str, Found]] = {model: {} for model in args.models}
    killed = []
    for cell in tqdm(cells, disable=None):
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                found = process.submit(measure, cell).result()
        except BrokenProcessPool:
            killed.append(f"{cell.model} {cell.objective} {cell.precision}")
            continue
        tqdm.write(as_text(cell, found))
        sys.stdout.flush()  # a run that is cut short has said what it knows
        is_first = cell.precision == args.precisions[0]
        suffix = "" if is_first else f"_{cell.precision}"
        fields = {f"{name}{suffix}": value for name, value in found.items()}
        report[cell.model].setdefault(cell.objective, {}).update(fields)
    if args.json:
        print(json.dumps(report))
    if killed:
        sys.exit(
            f"error: not measured: {', '.join(killed)}: the process was killed, by the system if "
            f"memory ran out; give a smaller --micro-batch-tokens, or --no-peers"
        )


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=SIZES, default=["nano", "17m"], metavar="SIZE")
    add("--objectives", nargs="+", choices=["mlm", "clm"], default=["mlm", "clm"])
    add("--precisions", nargs="+", choices=["fp32", "bf16", "fp8"], help="fp32, on a GPU bf16")
    add("--device", choices=["cpu", "cuda"], help="a GPU if there is one")
    add("--data", type=Path, default=Path("examples/data/quickstart.yaml"), help="its `data`")
    add("--rounds", type=int, default=7, help="timed steps of each contender (7)")
    add("--micro-batch-tokens", type=int, help="slots of a micro-batch (CPU 4096, GPU 65536)")
    add("--cuda-graphs", action="store_true", help="ours with hardware.cuda_graphs")
    add("--no-peers", action="store_true", help="measure this project alone")
    add("--path-cost", action="store_true", help="also the cost over plain PyTorch by part (CPU)")
    add("--profile", type=Path, help="keep a trace of each cell below this folder")
    add("--threads", type=int, default=os.cpu_count(), help="of the process, on a CPU")
    add("--json", action="store_true", help="end with one JSON object: model, objective, figures")
    args = parser.parse_args()
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.precisions = args.precisions or ["fp32" if args.device == "cpu" else "bf16"]
    if args.path_cost and args.device != "cpu":
        parser.error("--path-cost is measured on a CPU")
    return args


def measure(cell: Cell) -> Found:
    """Measure one cell; called in a process of its own."""
    import warnings

    warnings.filterwarnings("ignore", module=r"megatron\.core")
    from megatron_ettin import distributed
    from megatron_ettin.evaluation import throughput
    from megatron_ettin.evaluation.path_cost import path_cost

    with tempfile.TemporaryDirectory(prefix="bench_train.") as folder:
        configured = partial(configuration, cell, Path(folder))
        with distributed.process_groups(configured(cell.micro_batch_slots).hardware):
            in_turns = throughput.side_by_side if cell.device == "cpu" else throughput.one_by_one
            measured = in_turns(
                contenders(cell, configured),
                micro_batch_slots=cell.micro_batch_slots,
                rounds=cell.rounds,
            )
            found = as_fields(measured)
            if cell.path_cost:
                parts = path_cost(configured(cell.micro_batch_slots), rounds=cell.rounds)
                found["path_cost"] = {part: seconds.share for part, seconds in parts.items()}
            if cell.profile is not None or cell.device == "cuda":
                slots = measured["ours"].micro_batch_slots
                found |= profile(cell, configured(slots), Path(folder))
    return found


def configuration(cell: Cell, folder: Path, slots: int) -> Any:
    """Return a run of the cell with micro-batches of `slots`, in a folder of its own."""
    from megatron_ettin.config import parse_args

    rows = STEP_SLOTS[cell.device] // SEQ_LENGTH
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


def contenders(cell: Cell, configured: Any) -> dict[str, Any]:
    """Return what the cell compares, by name; ours is first."""
    from megatron_ettin.data.orders import sample_order
    from megatron_ettin.evaluation.contenders import (
        Ours,
        Transformers,
        packed_batches,
        padded_batches,
    )

    def packed(slots: int, sparse: bool = False) -> Any:
        config = configured(slots)
        batches = packed_batches(config, sample_order(config))
        count = STEP_SLOTS[cell.device] // slots
        return Transformers(config, batches, sparse=sparse, micro_batches=count)

    def padded(slots: int, by_length: bool = False, attention: str = "sdpa") -> Any:
        config = configured(slots)
        documents = PADDED_DOCUMENTS if cell.device == "cpu" else slots // SEQ_LENGTH
        ids = sample_order(config).ids
        batches = padded_batches(config, ids, batch_size=documents, by_length=by_length)
        count = STEP_SLOTS[cell.device] // slots
        return Transformers(
            config, batches, sparse=is_encoder, micro_batches=count, attention=attention
        )

    is_encoder = cell.objective == "mlm"
    found: dict[str, Any] = {"ours": lambda slots: Ours(configured(slots))}
    if cell.device == "cuda":
        found["ours_data_on_gpu"] = lambda slots: Ours(configured(slots), data_stays=True)
    if not cell.peers or cell.precision == "fp8":
        return found
    found["peer_packed"] = packed
    if is_encoder:
        found["peer_packed_sparse"] = partial(packed, sparse=True)
    found["peer_padded"] = padded
    found["peer_padded_by_length"] = partial(padded, by_length=True)
    if cell.device == "cuda" and has_flash_attention():
        found["peer_padded_flash"] = partial(padded, attention="flash_attention_2")
    return found


def has_flash_attention() -> bool:
    """Tell whether transformers can use the package flash-attn."""
    from importlib.util import find_spec

    return find_spec("flash_attn") is not None


def profile(cell: Cell, config: Any, folder: Path) -> Found:
    """Trace some steps of ours; on a GPU return its idle share."""
    import logging

    from megatron_ettin.evaluation.contenders import Ours
    from megatron_ettin.training.profile import TRACE_FILE, idle_share, kernel_intervals, profiled

    if cell.profile is not None:
        folder = cell.profile / f"{cell.model}_{cell.objective}_{cell.precision}"
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    with (
        closing(Ours(config)) as ours,
        profiled(folder, warm_up=2, steps=2) as step_done,
    ):
        for _ in range(4):
            ours.step()
            step_done()
    intervals = kernel_intervals(folder / TRACE_FILE)
    return {"ours_idle_share": idle_share(intervals)} if len(intervals) else {}


def as_fields(measured: dict[str, Any]) -> Found:
    """Return the figures of a cell by the names that they have in the JSON object."""
    import torch

    from megatron_ettin.model.counts import mfu
    from megatron_ettin.model.gpus import gpu_called

    found: Found = {}
    for name, measurement in measured.items():
        found[f"{name}_tokens_per_s"] = measurement.tokens_per_s
        found[f"{name}_slowest_fastest"] = measurement.spread
        found[f"{name}_fill"] = measurement.fill
        if measurement.peak_memory_bytes is not None:
            found[f"{name}_peak_memory_bytes"] = measurement.peak_memory_bytes
            found[f"{name}_micro_batch_slots"] = measurement.micro_batch_slots
        gpu = gpu_called(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        if gpu is not None and measurement.flops_per_s is not None:
            peak = gpu.peak_flops["bf16"]
            found[f"{name}_mfu"] = mfu(measurement.flops_per_s, peak, gpu.name)
    return found


def as_text(cell: Cell, found: Found) -> str:
    """Return the lines of a cell for people: rates, their ratio to ours, and what else is known."""
    lines = [f"{cell.model} {cell.objective} {cell.precision} on {cell.device}"]
    ours = found["ours_tokens_per_s"]
    names = [name.removesuffix("_tokens_per_s") for name in found if name.endswith("_tokens_per_s")]
    for name in names:
        rate = found[f"{name}_tokens_per_s"]
        low, high = found[f"{name}_slowest_fastest"]
        line = f"  {name:22} {rate:12,.0f} tokens/s ({low:,.0f} to {high:,.0f})"
        line += f"  fill {found[f'{name}_fill']:6.1%}  ours is {ours / rate:.2f} x"
        if f"{name}_mfu" in found:
            line += f"  MFU {found[f'{name}_mfu']:.1%}"
        if f"{name}_peak_memory_bytes" in found:
            line += f"  {found[f'{name}_peak_memory_bytes'] / 2**30:.1f} GiB"
        lines.append(line)
    if "ours_idle_share" in found:
        lines.append(f"  the GPU is idle for {found['ours_idle_share']:.1%} of the steps")
    for part, share in found.get("path_cost", {}).items():
        lines.append(f"  Megatron-Core's path costs {share:+.1%} over plain PyTorch: {part}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
