"""Program of each of four ranks of the mutation test: a few steps for each fault, one at a time.

The ranks train through the parts of a run and compare with the run of one process that the test
has made: losses, gradient norms, and each rank its shards of the weights. One world for all faults:
new processes would cost more than the steps.
"""

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.distributed import distributed_c10d

from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig, RunConfig, parse_args
from megatron_ettin.data.orders import open_order
from megatron_ettin.model.initialize import local_shard
from megatron_ettin.model.provider import build_model, logical_parameters
from megatron_ettin.order import SampleOrder
from megatron_ettin.training.micro_batch import forward_step
from megatron_ettin.training.optimizer import build_optimizer
from megatron_ettin.training.preparation import micro_batches
from megatron_ettin.training.set_up import build_loader
from tests.integration.planted_faults import FAULTS

STEPS = 3
#: Four ranks in each. The names say what differs from data parallelism.
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2dp2": {"tensor_parallel_size": 2},
    "tp2cp2sp": {"tensor_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True},
    "tp2pp2sp": {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "sequence_parallel": True,
        "recompute": "full",
    },
    "cp2dp2": {"context_parallel_size": 2, "use_distributed_optimizer": False},
    "dp4": {"use_distributed_optimizer": False},
}
#: Those of the layout tests, and of the test of the gradient norm.
TOLERANCE = {"losses": 1e-5, "weights": 1e-5, "norms": 1e-4}


class Outcome(NamedTuple):
    """What a few steps leave: by step, and by logical name."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.nn.Parameter]


def main(arguments: list[str], reference: Path, found: Path) -> None:
    """Write for each fault, and for none in each layout, by what it shows and whether it ran."""
    config = parse_args(arguments)
    order, expected = open_order(config), Outcome(**torch.load(reference))
    results: dict[str, list[str]] = {}
    with distributed.process_groups(HardwareConfig()):
        for name, fields in LAYOUTS.items():
            hardware = dataclasses.replace(config.hardware, **fields)
            change_groups(hardware)
            in_layout = dataclasses.replace(config, hardware=hardware)
            shown = shown_by(in_layout, order, expected)
            results[f"no fault in {name}"] = of_all_ranks(shown)
            for fault in FAULTS:
                if fault.layout == name:
                    reached: list[str] = []
                    with pytest.MonkeyPatch.context() as patch:
                        fault.plant(patch, reached)
                        shown = shown_by(in_layout, order, expected)
                    ran = int(distributed.all_reduce_sum(torch.tensor(len(reached))))
                    results[fault.what] = of_all_ranks(shown) if ran else ["never ran"]
        if distributed.is_main_rank():
            found.write_text(json.dumps(results))


def of_all_ranks(shown: list[str]) -> list[str]:
    """Return by what any rank shows a difference."""
    return sorted({name for names in distributed.all_gather(shown) for name in names})


def change_groups(hardware: HardwareConfig) -> None:
    """End the groups of a layout, with their threads, and make those of another."""
    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    gc.collect()
    parallel_state.initialize_model_parallel(
        hardware.tensor_parallel_size,
        hardware.pipeline_parallel_size,
        context_parallel_size=hardware.context_parallel_size,
    )


def shown_by(config: RunConfig, order: SampleOrder, expected: Outcome) -> list[str]:
    """Return in what this rank's steps differ from those of one process."""
    outcome = take_steps(config, order)
    differences = {
        "losses": largest_difference(outcome.losses, expected.losses),
        "norms": largest_difference(outcome.norms, expected.norms),
        "weights": max(
            distance(weight, local_part(expected.weights[name], weight))
            for name, weight in outcome.weights.items()
        ),
    }
    print(json.dumps(differences), flush=True)
    # Written so that NaN is a difference.
    return [name for name, value in differences.items() if not value <= TOLERANCE[name]]


def take_steps(config: RunConfig, order: SampleOrder) -> Outcome:
    """Train the first rows for a few steps as a run does."""
    stage = build_model(config.model, "bidirectional", config.hardware, config.seeds)
    stage.set_rotary_bases(160_000.0, 10_000.0)
    stage.config.finalize_model_grads_func = finalize_model_grads
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.hardware.use_distributed_optimizer
        and distributed.data_parallel_group().size() > 1,
    )
    ddp = DistributedDataParallel(stage.config, ddp_config, stage)
    optimizer = build_optimizer(ddp, config.optimizer, config.hardware)
    loader, rows = build_loader(config, order), config.phases[0].global_batch_size
    losses, norms = [], []
    for begin in range(0, STEPS * rows, rows):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=micro_batches(loader, begin, begin + rows),
            model=ddp,
            num_microbatches=loader.num_micro_batches(begin, begin + rows),
            seq_length=loader.micro_batch_slots(begin),
            micro_batch_size=1,
        )
        optimizer.set_lr(config.optimizer.lr)
        optimizer.step()
        sums = torch.zeros(2, dtype=torch.float64)
        if distributed.counts_losses():
            for report in reports:
                sums += torch.stack([report["loss_sums"].sum(), report["counts"].sum().double()])
        total, count = distributed.all_reduce_sum(sums).tolist()
        losses.append(total / count)
        norms.append(optimizer.gradient_norm())
    return Outcome(losses, norms, dict(logical_parameters(stage)))


def local_part(whole: torch.Tensor, weight: torch.nn.Parameter) -> torch.Tensor:
    """Return the part of a whole tensor that this rank holds as `weight`."""
    rank, size = distributed.tensor_parallel_rank(), distributed.tensor_parallel_size()
    return local_shard(whole, weight, rank, size)


def distance(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative L2 distance |a - b| / |b|."""
    expected = expected.detach().double()
    return float((tensor.detach().double() - expected).norm() / expected.norm())


def largest_difference(values: list[float], expected: list[float]) -> float:
    """Return max |a - b| / |b|; NaN if there is one."""
    pairs = zip(values, expected, strict=True)
    return float(torch.tensor([abs(a - b) / abs(b) for a, b in pairs]).max())
