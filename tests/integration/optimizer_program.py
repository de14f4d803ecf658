"""Program of each of four ranks of the optimizer test: every layout, against whole float64 tensors.

Megatron-Core's gradient buffers are filled with gradients that are a function of (logical name,
step, element); after every step this rank's weights are compared with its shards of a reference
that holds whole tensors and knows of no layout. Ends with an AssertionError that names case, step
and tensor at the first difference.
"""

import functools
import gc
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch.distributed import distributed_c10d

from megatron_ettin import checkpoint, distributed, native
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import (
    DataConfig,
    HardwareConfig,
    ModelConfig,
    OptimizerConfig,
    OptimizerName,
    PhaseConfig,
    RunConfig,
    SeedConfig,
)
from megatron_ettin.model import weight_map
from megatron_ettin.model.ettin_model import EttinModel
from megatron_ettin.model.initialize import initial_tensor, local_shard
from megatron_ettin.model.provider import build_model, logical_parameters
from megatron_ettin.objectives import CausalLM
from megatron_ettin.training.optimizer import ShardedOptimizer, build_optimizer

STEPS = 50
#: 500 tokens are padded to 512; three heads would not divide by four.
MODEL = ModelConfig(
    num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, vocab_size=500
)
PEAK, DECAY, BETAS, EPS, INIT_SEED = 0.02, 0.01, (0.9, 0.98), 1e-6, 3
#: On fp32 weights. Each of 50 steps rounds a weight below 2 (by at most 6e-8) and takes an update
#: of at most about 0.02, wrong by about 1e-6 of itself in fp32: 50 * (6e-8 + 2e-8) = 4e-6 if all
#: errors had one sign; measured 1e-6. Counting padding as embeddings gives 5e-5 and more, counting
#: a replicated tensor once for each rank 1e-3.
TOLERANCE = 2e-6

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """An optimizer, as four ranks hold it in a layout."""

    tensor: int
    pipeline: int
    precision: Literal["fp32", "bf16"]
    shares_state: bool
    name: OptimizerName

    @property
    def hardware(self) -> HardwareConfig:
        return HardwareConfig(
            tensor_parallel_size=self.tensor,
            pipeline_parallel_size=self.pipeline,
            precision=self.precision,
            use_distributed_optimizer=self.shares_state,
        )


#: By layout (tensor- and pipeline-parallel size, the rest of the four ranks is data-parallel),
#: because a new layout needs new process groups, which cost more than the steps.
CASES = [
    Case(4, 1, "fp32", True, "stable_adamw"),
    Case(1, 4, "fp32", True, "stable_adamw"),
    Case(2, 2, "fp32", True, "stable_adamw"),
    Case(2, 2, "bf16", False, "stable_adamw"),
    Case(1, 1, "fp32", True, "stable_adamw"),
    Case(1, 1, "fp32", False, "stable_adamw"),
    Case(1, 2, "fp32", True, "stable_adamw"),
    Case(1, 2, "bf16", True, "stable_adamw"),
    Case(1, 2, "bf16", False, "adamw"),
    Case(2, 1, "fp32", True, "stable_adamw"),
    Case(2, 1, "fp32", False, "stable_adamw"),
    Case(2, 1, "bf16", True, "stable_adamw"),
    Case(2, 1, "bf16", False, "stable_adamw"),
    Case(2, 1, "fp32", True, "adamw"),
]
#: The first half of the steps as one case, the rest as another that resumes from its checkpoint.
RESUMED = [
    (Case(2, 1, "fp32", True, "stable_adamw"), Case(1, 2, "fp32", False, "stable_adamw")),
    (Case(1, 2, "bf16", False, "stable_adamw"), Case(2, 1, "bf16", True, "stable_adamw")),
    (Case(2, 1, "bf16", False, "stable_adamw"), Case(1, 1, "bf16", False, "stable_adamw")),
]


def main(checkpoints: Path) -> None:
    # One world for all layouts: a second one would need another port, which may be taken by then.
    with distributed.process_groups(HardwareConfig()):
        for case in CASES:
            report(str(case), Rank(case).take_steps(range(1, STEPS + 1)))
        for number, (case, other) in enumerate(RESUMED):
            folder = checkpoints / str(number)
            first = Rank(case)
            first.take_steps(range(1, STEPS // 2))
            first.save(folder)
            second = Rank(other)
            checkpoint.load(folder, second.stage, second.optimizer, MODEL)
            report(f"{case} -> {other}", second.take_steps(range(STEPS // 2, STEPS + 1)))


def end_groups() -> None:
    """End a layout's groups: each has threads, one of which wakes a hundred times a second."""
    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    gc.collect()


def report(what: str, worst: float) -> None:
    print(f"rank{distributed.rank()}: {what}: {worst:.1e}", flush=True)


class Rank:
    """This rank's part of a case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        if layout() != (case.tensor, case.pipeline):
            end_groups()
            parallel_state.initialize_model_parallel(case.tensor, case.pipeline)
        self.stage = build_model(MODEL, "causal", case.hardware, SeedConfig(init=INIT_SEED))
        self.ddp = DistributedDataParallel(
            self.stage.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=case.shares_state
            ),
            self.stage,
        )
        self.config = OptimizerConfig(
            name=case.name,
            lr=PEAK,
            weight_decay=DECAY,
            beta1=BETAS[0],
            beta2=BETAS[1],
            epsilon=EPS,
        )
        self.optimizer = build_optimizer(self.ddp, self.config, case.hardware)

    def take_steps(self, steps: range) -> float:
        """Take steps, comparing the weights after each; return the largest difference."""
        worst = 0.0
        expected = reference(self.case.name, self.case.precision)
        for step in steps:
            self.ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            set_gradients(self.stage, step)
            self.ddp.finish_grad_sync()
            self.optimizer.set_lr(rate(step))
            self.optimizer.step()
            where = f"{self.case} step {step}"
            worst = max(worst, compare(self.stage, self.optimizer, expected[step - 1], where))
        return worst

    def save(self, folder: Path) -> None:
        """Write a checkpoint, with settings that must not come back with the state."""
        for group in self.optimizer.param_groups:
            group |= {"weight_decay": 0.5, "betas": (0.1, 0.2), "eps": 1.0}
        phase = PhaseConfig(
            name="a",
            train_tokens=1,
            seq_length=8192,
            global_batch_size=1,
            rotary_base_global=10_000.0,
            rotary_base_local=10_000.0,
        )
        config = RunConfig(
            objective=CausalLM(),
            model=MODEL,
            phases=[phase],
            data=DataConfig(tokenizer="", sources={}, blend={"a": {}}),
            optimizer=self.config,
            run_dir="",
            hardware=self.case.hardware,
        )
        state = RunState()
        files = checkpoint.write(folder, self.stage, self.optimizer, config=config, state=state)
        checkpoint.publish(folder, files, state)


def layout() -> tuple[int, int]:
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )


def rate(step: int) -> float:
    """Warm up over ten steps, from zero, then fall."""
    return PEAK * min((step - 1) / 10, 1.0 - step / 100)


@functools.cache
def gradients(step: int) -> Tensors:
    """Return whole gradients of at most 20 bits, so that their sums are exact; some are spikes."""
    values = counter_values("gradient", step)
    spikes = {name for name in values if (step + zlib.crc32(name.encode())) % 7 == 0}
    return {name: 32.0 * g if name in spikes else g for name, g in values.items()}


@functools.cache
def counter_values(kind: str, step: int) -> Tensors:
    """Return a whole tensor of multiples of 2^-12 in [-1, 1] for every logical name."""
    values = {}
    for name, entry in weight_map.entries(MODEL.num_layers).items():
        shape = weight_map.huggingface_shape(entry, MODEL)
        uniform = native.uniform_weights(f"{kind} {name}", step, 0, math.prod(shape), -1.0, 1.0)
        rounded = torch.from_numpy(np.round(uniform * 4096) / 4096).view(shape)
        values[name] = weight_map.from_huggingface(entry, rounded, MODEL)
    return values


def set_gradients(stage: EttinModel, step: int) -> None:
    """Give each data-parallel rank a part of the gradient; the parts add up to it."""
    replica, replicas = distributed.data_parallel()
    for name, parameter in logical_parameters(stage):
        part = gradients(step)[name] / replicas
        if replicas > 1 and replica < 2:
            part = part + (1 - 2 * replica) * counter_values("part", step)[name]
        parameter.main_grad.copy_(shard(part, parameter))


def shard(whole: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    rank, size = distributed.tensor_parallel_rank(), distributed.tensor_parallel_size()
    return local_shard(whole, parameter, rank, size)


def compare(stage: EttinModel, optimizer: Any, expected: Tensors, where: str) -> float:
    """Compare model weights, and the fp32 weights that they are made from if they are bf16."""
    worst = 0.0
    for name, parameter in logical_parameters(stage):
        wanted = shard(expected[name], parameter)
        if parameter.dtype == torch.bfloat16:
            # Rounded to 8 bits, from a value that may itself be off by the tolerance.
            difference = (parameter.double() - wanted).abs()
            assert bool((difference <= wanted.abs() / 256 + TOLERANCE).all()), f"{where}: {name}"
        found, wanted = main_weights(optimizer, parameter, wanted)
        if found.numel():
            difference = float((found.double() - wanted).abs().max())
            assert difference <= TOLERANCE, f"{where}: {name} differs by {difference}"
            worst = max(worst, difference)
    return worst


def main_weights(
    optimizer: Any, parameter: torch.nn.Parameter, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's fp32 weights of a parameter, and the part of `wanted` that they are."""
    if parameter.dtype == torch.float32:
        return parameter.detach(), wanted
    if not isinstance(optimizer, ShardedOptimizer):
        return parameter.main_param, wanted
    if parameter not in optimizer.model_param_group_index_map:
        return torch.empty(0), torch.empty(0)
    group, order = optimizer.model_param_group_index_map[parameter]
    held = optimizer._get_model_param_range_map(parameter)["param"]
    return optimizer.optimizer.param_groups[group]["params"][order], wanted.view(-1)[
        held.start : held.end
    ]


def first_weights(precision: str) -> Tensors:
    entries = weight_map.entries(MODEL.num_layers)
    weights = {name: initial_tensor(entry, MODEL, INIT_SEED) for name, entry in entries.items()}
    if precision == "bf16":
        weights = {name: weight.bfloat16() for name, weight in weights.items()}
    return {name: weight.double() for name, weight in weights.items()}


@functools.cache
def reference(optimizer: str, precision: str) -> list[Tensors]:
    """Return whole float64 weights after each step."""
    weights = first_weights(precision)
    steps = REFERENCES[optimizer](weights)
    return [{name: weight.detach().clone() for name, weight in step.items()} for step in steps]


def stable_adamw(weights: Tensors) -> Iterator[Tensors]:
    """Yield the weights after each step of ModernBERT's StableAdamW, tensor by tensor."""
    rows = {name: MODEL.vocab_size if is_padded(name) else len(w) for name, w in weights.items()}
    firsts = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    seconds = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    damped = 0
    for step in range(1, STEPS + 1):
        beta1, beta2 = ((beta**step - beta) / (beta**step - 1) for beta in BETAS)
        for name, weight in weights.items():
            g, m, v = gradients(step)[name].double(), firsts[name], seconds[name]
            m.copy_(beta1 * m + (1 - beta1) * g)
            v.copy_(beta2 * v + (1 - beta2) * g**2)
            ratio = g**2 / torch.maximum(v, torch.tensor(EPS**2))
            rms = float(ratio[: rows[name]].mean().sqrt())
            damped += rms > 2.0
            lr = rate(step) / max(1.0, rms)
            if weight.dim() > 1:
                weight.mul_(1 - lr / PEAK * DECAY)
            weight.sub_(lr * m / (v.sqrt() + EPS))
        yield weights
    assert damped > 100, "the gradients hardly triggered the damping"


def adamw(weights: Tensors) -> Iterator[Tensors]:
    """Yield the weights after each step of torch's AdamW."""
    parameters = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    for step in range(1, STEPS + 1):
        for name, parameter in parameters.items():
            parameter.grad = gradients(step)[name].double()
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        yield {name: parameter.detach() for name, parameter in parameters.items()}


def is_padded(name: str) -> bool:
    return name in ("embedding.word_embeddings.weight", "output_layer.bias")


#: By optimizer.name: its update of whole float64 tensors.
REFERENCES = {"stable_adamw": stable_adamw, "adamw": adamw}
