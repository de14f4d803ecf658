"""Times of single kernels at the sizes of a model, forward and backward.

`KERNELS` lists them: a new kernel is one function and one line there. Each is called as a layer
calls it, so nothing is timed beside it: no copy of what it overwrites, no joining of its outputs.
Attention comes from `attention_times.py`.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from benchmarks.attention_times import attention_times, documents
from benchmarks.model_sizes import model_of_size
from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig, ModelConfig
from megatron_ettin.model.attention import PackedRows
from megatron_ettin.model.dropout import LayerDropout, OutputDropout
from megatron_ettin.model.layer_spec import GatedGelu
from megatron_ettin.model.linear_cross_entropy import linear_cross_entropy
from megatron_ettin.model.norm import LayerNorm
from megatron_ettin.model.provider import transformer_config
from megatron_ettin.model.rotary import RotaryTables, rotated
from megatron_ettin.training.layer_times import median_seconds

Step = Callable[[], tuple[torch.Tensor, ...]]
"""Goes forward and backward; returns the gradients."""
#: Share of the slots that are scored, of the embedding's rows that are [MASK], and of the channels
#: that are dropped.
SCORED, MASKED, DROPPED = 0.3, 0.24, 0.1
#: Slots of a row, and the mean tokens of a document.
SEQ_LENGTH, DOCUMENT_TOKENS = 1024, 200
WARM_UP = 3


@dataclass(frozen=True)
class Sizes:
    """A micro-batch of a model, on this rank's device."""

    model: ModelConfig
    rows: int
    """Slots of the micro-batch; the rows of the matrices that a kernel gets."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of activations and weights."""
        return torch.bfloat16 if distributed.device().type == "cuda" else torch.float32

    def matrix(self, rows: int, *shape: int) -> torch.Tensor:
        """Return random values [rows, *shape] that ask for a gradient."""
        shape = (rows, *shape)
        device = distributed.device()
        return torch.randn(shape, device=device, dtype=self.dtype, requires_grad=True)


@dataclass(frozen=True)
class KernelTime:
    """Time of a kernel, forward and backward together."""

    model: str
    channels: int
    kernel: str
    milliseconds: float


def times_of_models(sizes: Iterable[str], rows: int, *, rounds: int) -> Iterator[KernelTime]:
    """Measure all kernels for models of examples/model/; yield each as soon as it is known."""
    with distributed.process_groups(HardwareConfig()):
        for size in sizes:
            model = model_of_size(size)
            for kernel, build in KERNELS.items():
                step = build(Sizes(model, rows))
                seconds = median_seconds(step, untimed=WARM_UP, timed=rounds, device_alone=True)
                yield KernelTime(size, model.hidden_size, kernel, 1e3 * seconds)
            yield from _attention(size, model, rows, rounds)


def _attention(size: str, model: ModelConfig, rows: int, rounds: int) -> Iterator[KernelTime]:
    """Measure the bidirectional attention of a global and of a local layer, by kernel."""
    borders = documents(rows, min(SEQ_LENGTH, rows), DOCUMENT_TOKENS)
    found = attention_times(model, "bidirectional", borders, rounds=rounds, with_empty=False)
    for kernel, times in found.items():
        for kind in ("global", "local"):
            if f"{kind}_ms" in times:
                name = f"{kind} attention, {kernel}"
                yield KernelTime(size, model.hidden_size, name, times[f"{kind}_ms"])


def _passes(
    forward: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]], inputs: list[torch.Tensor]
) -> Step:
    """Return a function that goes forward, and backward from ones for each output."""

    def outputs() -> tuple[torch.Tensor, ...]:
        found = forward()
        return (found,) if isinstance(found, torch.Tensor) else found

    ones = [torch.ones_like(each) for each in outputs()]
    return lambda: torch.autograd.grad(outputs(), inputs, ones)


def _layer_norm(sizes: Sizes) -> Step:
    channels = sizes.model.hidden_size
    x, weight = sizes.matrix(sizes.rows, channels), sizes.matrix(channels)
    return _passes(lambda: F.layer_norm(x, (channels,), weight), [x, weight])


def _layer_norm_of_more_rows(sizes: Sizes) -> Step:
    # torch sums the weight's gradient in parallel only above 65,536 rows.
    return _layer_norm(Sizes(sizes.model, sizes.rows + SEQ_LENGTH))


def _gated_gelu(sizes: Sizes) -> Step:
    gated = sizes.matrix(sizes.rows, 2 * sizes.model.ffn_hidden_size)
    activation = GatedGelu(_settings(sizes))
    return _passes(lambda: activation(gated), [gated])


def _dropout(sizes: Sizes) -> Step:
    """Drop a tenth with torch's kernel. Ours draws inside the addition: see the lines with it."""
    x = sizes.matrix(sizes.rows, sizes.model.hidden_size)
    return _passes(lambda: F.dropout(x, DROPPED), [x])


def _add_and_normalise(sizes: Sizes) -> Step:
    """Add a residual to an output, and normalise the sum."""
    return _of_sum(sizes, dropout=None)


def _add_drop_and_normalise(sizes: Sizes) -> Step:
    """Add a residual to an output of which a tenth is dropped, and normalise the sum."""
    seq_length = min(SEQ_LENGTH, sizes.rows)
    g = torch.arange(sizes.rows // seq_length, device=distributed.device())
    return _of_sum(sizes, LayerDropout(OutputDropout(DROPPED, seed=1), 0, g, seq_length, 0))


def _of_sum(sizes: Sizes, dropout: LayerDropout | None) -> Step:
    channels = sizes.model.hidden_size
    norm = LayerNorm(_settings(sizes), channels, 1e-5).to(distributed.device())
    residual, branch = (sizes.matrix(sizes.rows, 1, channels) for _ in range(2))
    inputs = [residual, branch, norm.weight]
    return _passes(lambda: norm.of_sum(residual, branch, dropout), inputs)


def _rotation(sizes: Sizes) -> Step:
    """Rotate queries and keys, as in a layer: a GPU turns the same ones on and on, in place."""
    config, table, packed = _rotated_rows(sizes)
    qkv = _projected(sizes)
    return _passes(lambda: rotated(qkv, table, packed, config), [qkv])


def _rotation_by_megatron_core(sizes: Sizes) -> Step:
    config, _, packed = _rotated_rows(sizes)
    assert packed.position_ids is not None
    qkv = _projected(sizes)
    table = torch.randn(len(packed.position_ids), 1, 1, sizes.model.head_size).to(qkv.device)

    def forward() -> tuple[torch.Tensor, ...]:
        query, key, value = qkv.unbind(dim=3)
        q, k = (apply_rotary_pos_emb(x, table, config=config) for x in (query, key))
        return q, k, value

    return _passes(forward, [qkv])


def _settings(sizes: Sizes) -> TransformerConfig:
    precision: Literal["bf16", "fp32"] = "bf16" if sizes.dtype == torch.bfloat16 else "fp32"
    return transformer_config(sizes.model, "causal", HardwareConfig(precision=precision))


def _rotated_rows(sizes: Sizes) -> tuple[TransformerConfig, torch.Tensor, PackedRows]:
    """Return the settings, the table of global layers, and rows of one document each."""
    device, length = distributed.device(), min(SEQ_LENGTH, sizes.rows)
    borders = torch.arange(0, sizes.rows + 1, length, dtype=torch.int32, device=device)
    positions = torch.arange(sizes.rows, device=device) % length
    packed = PackedRows.of(borders, length, positions, borders[:-1].long())
    config = _settings(sizes)
    return config, RotaryTables(config, 160_000.0, 10_000.0).of(packed)[0], packed


def _projected(sizes: Sizes) -> torch.Tensor:
    """Return the output of a layer's projection [rows, 1, heads, 3, head size]."""
    return sizes.matrix(sizes.rows, 1, sizes.model.num_attention_heads, 3, sizes.model.head_size)


def _loss(sizes: Sizes) -> Step:
    model, scored = sizes.model, int(SCORED * sizes.rows)
    hidden = sizes.matrix(scored, model.hidden_size)
    weight, bias = (
        sizes.matrix(model.padded_vocab_size, model.hidden_size),
        sizes.matrix(model.padded_vocab_size),
    )
    labels = torch.arange(scored, device=distributed.device()) % model.vocab_size
    group = ProcessGroupCollection.use_mpu_process_groups(["tp"]).tp

    def forward() -> torch.Tensor:
        return linear_cross_entropy(
            hidden, weight, bias, labels, vocab_size=model.vocab_size, group=group
        ).total

    return _passes(forward, [hidden, weight, bias])


def _embedding(sizes: Sizes) -> Step:
    """Look tokens up; a quarter of them are equal, whose gradients are added up."""
    weight = sizes.matrix(sizes.model.padded_vocab_size, sizes.model.hidden_size)
    tokens = torch.arange(sizes.rows, device=distributed.device()) % sizes.model.vocab_size
    tokens[: int(MASKED * sizes.rows)] = 0
    return _passes(lambda: F.embedding(tokens, weight), [weight])


KERNELS: dict[str, Callable[[Sizes], Step]] = {
    "layer norm, torch": _layer_norm,
    "layer norm, torch, 1,024 rows more": _layer_norm_of_more_rows,
    "gated gelu": _gated_gelu,
    "dropout, torch": _dropout,
    "add and normalise": _add_and_normalise,
    "add, drop and normalise": _add_drop_and_normalise,
    "rotation": _rotation,
    "rotation, megatron-core": _rotation_by_megatron_core,
    "loss": _loss,
    "embedding": _embedding,
}
