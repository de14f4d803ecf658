"""Prediction of a micro-batch on a GPU from what the model would launch there, without a GPU.

Every number comes from the model's own code, run on a GPU that is not there (`fake_gpu.py`), and
from the rates below, which are assumptions. A launch takes as long as the slower of its bytes and
its operations, and a gap before it. Not in it: the optimizer's step, reductions over ranks, a host
that is slower than its kernels, and kernels that reach less than these rates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.fake_gpu import GPU, MATMULS, Launch, fake_gpu
from benchmarks.model_sizes import model_of_size
from megatron_ettin.config import HardwareConfig, ModelConfig, SeedConfig
from megatron_ettin.model import counts
from megatron_ettin.model.attention import PackedRows
from megatron_ettin.model.provider import Attention, build_stage
from megatron_ettin.text_table import text_table
from megatron_ettin.training.micro_batch import scored_capacity

#: Groups of a table, and the launches in each; what is in none is "other".
GROUPS = {
    "matmul": tuple(MATMULS),
    "attention": ("_flash_attention_forward", "_flash_attention_backward"),
    "norm": ("forward_rows", "backward_rows"),
    "rotation": ("rotate_rows", "pack_rows"),
    "activation": ("multiply", "differentiate"),
    "loss": ("row_statistics", "row_gradient"),
}
#: Share of slots that a loss is computed at, by mask.
SCORED_SHARE: dict[Attention, float] = {"bidirectional": 0.3, "causal": 1.0}
#: Layers that are added to tell the cost of one: a global and two local ones.
PERIOD = 3
#: Bytes by which a parameter's gradient is added to Megatron-Core's: bf16 read, float32 both ways.
GRADIENT_BYTES = 10


@dataclass(frozen=True)
class GpuRates:
    """Rates that a GPU is assumed to reach; the defaults are for an H200."""

    bytes_per_second: float = 3.9e12
    """80 % of the memory's peak."""
    matmul_flops: float = 600e12
    """Operations per second, 60 % of the peak in bf16."""
    attention_flops: float = 250e12
    gap_seconds: float = 1.2e-6
    """Between two kernels of a graph."""
    document_tokens: float = 230.0
    """Mean length of documents. A token sees 1.8 times as many keys, as long ones hold more."""


@dataclass(frozen=True)
class StepPrediction:
    """Passes of one micro-batch of `slots` slots."""

    slots: int
    launches_per_layer: float
    """Mean over a global and two local layers."""
    bytes_per_layer: float
    """Mean bytes for each slot."""
    milliseconds: dict[str, float]
    """By group."""

    @property
    def tokens_per_second(self) -> float:
        """Slots by time."""
        return 1e3 * self.slots / sum(self.milliseconds.values())


def predict(size: str, attention: Attention, slots: int, rates: GpuRates) -> StepPrediction:
    """Predict the passes of a model of examples/model/; needs process groups."""
    model = model_of_size(size)
    whole = launches(model, attention, slots)
    longer = ModelConfig(**{**vars(model), "num_layers": model.num_layers + PERIOD})
    more = launches(longer, attention, slots)
    added_bytes = _total_bytes(more) - _total_bytes(whole)
    milliseconds: dict[str, float] = defaultdict(float)
    for launch in whole:
        milliseconds[_group(launch)] += 1e3 * seconds(launch, attention, rates)
    added_up = GRADIENT_BYTES * counts.parameters(model).total / rates.bytes_per_second
    milliseconds["other"] += 1e3 * added_up
    return StepPrediction(
        slots=slots,
        launches_per_layer=(len(more) - len(whole)) / PERIOD,
        bytes_per_layer=added_bytes / PERIOD / slots,
        milliseconds=dict(milliseconds),
    )


def launches(
    model: ModelConfig, attention: Attention, slots: int, seq_length: int = 1024
) -> list[Launch]:
    """Return what a forward and a backward pass launch; needs process groups."""
    with fake_gpu() as noted:
        hardware = HardwareConfig(precision="bf16")
        stage = build_stage(model, attention, hardware, SeedConfig()).train()
        tokens, positions = (torch.empty(slots, dtype=torch.int64, device=GPU) for _ in range(2))
        rows = torch.empty(slots // seq_length, dtype=torch.int64, device=GPU)
        boundaries = torch.empty(slots // 200 + 1, dtype=torch.int32, device=GPU)
        packed = PackedRows.of(boundaries, seq_length, positions, rows)
        count = scored_capacity("cuda", slots, SCORED_SHARE[attention])
        scored, labels = (torch.empty(count, dtype=torch.int64, device=GPU) for _ in range(2))
        # The tables of rotation are made once, for the first micro-batch.
        stage.rotary.of(packed)
        noted.noted.clear()
        stage(tokens, packed, scored, labels).total.backward()
    return noted.noted


def seconds(launch: Launch, attention: Attention, rates: GpuRates) -> float:
    """Return the time of a launch, with the gap before it."""
    rate = rates.matmul_flops
    flops = float(launch.flops)
    if launch.window is not None:
        rate = rates.attention_flops
        flops *= _keys(launch.window, attention, rates.document_tokens)
    return max(launch.num_bytes / rates.bytes_per_second, flops / rate) + rates.gap_seconds


def _keys(window: tuple[int, int], attention: Attention, document_tokens: float) -> float:
    """Return the keys that a kernel computes for a query, in whole tiles of 128 queries."""
    of_document = 1.8 * document_tokens * (0.5 if attention == "causal" else 1.0)
    left, right = window
    return of_document if left < 0 else min(of_document, 128.0 + left + right)


def _group(launch: Launch) -> str:
    return next((name for name, names in GROUPS.items() if launch.name in names), "other")


def _total_bytes(noted: Sequence[Launch]) -> int:
    return sum(launch.num_bytes for launch in noted)


def prediction_table(found: Mapping[tuple[str, Attention], StepPrediction]) -> Iterator[str]:
    """Yield the lines of a table, a model and mask each."""
    figures = ("launches/layer", "kB/layer", *GROUPS, "other", "ms", "tokens/s")
    rows = []
    for (size, attention), one in found.items():
        groups = [f"{one.milliseconds.get(group, 0.0):.1f}" for group in (*GROUPS, "other")]
        per_layer = (f"{one.launches_per_layer:.0f}", f"{one.bytes_per_layer / 1e3:.1f}")
        whole = (f"{sum(one.milliseconds.values()):.0f}", f"{one.tokens_per_second:,.0f}")
        rows.append((f"{size} {attention}", *per_layer, *groups, *whole))
    return text_table(("model", *figures), rows, numbers=figures)
