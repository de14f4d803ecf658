"""Choice of the attention kernel of a GPU by time, for the run's first rows of each length.

torch's kernel is the rule. Transformer Engine's plans for the longest segment and a rounded number
of segments. So its time depends on how many there are and how long they are, which no table knows.

No GPU has run this yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ettin import distributed
from megatron_ettin.config import RunConfig
from megatron_ettin.data.loader import Loader
from megatron_ettin.model.attention import (
    CoreAttention,
    KindAndLength,
    PackedRows,
    layer_kind,
    random_projection,
)
from megatron_ettin.model.attention_gpu import (
    TransformerEngineCoreAttention,
    VarlenCoreAttention,
    transformer_engine_attends,
)
from megatron_ettin.model.backend import by_transformer_engine, choose_backend
from megatron_ettin.model.provider import ATTENTION_MASKS, Attention, transformer_config
from megatron_ettin.rows import Rows
from megatron_ettin.training.layer_times import median_seconds
from megatron_ettin.training.micro_batch import segment_boundaries
from megatron_ettin.training.precision import fastest

logger = logging.getLogger(__name__)

#: The kernels, the one first that is taken unless another is clearly faster.
KERNELS: Mapping[str, type[CoreAttention]] = {
    "torch": VarlenCoreAttention,
    "transformer_engine": TransformerEngineCoreAttention,
}
#: Passes that are not timed, in which kernels are chosen and compiled, and passes that are.
UNTIMED, TIMED = 3, 10


def layers_of_transformer_engine(
    config: RunConfig, attention: Attention, loader: Loader, g: int
) -> frozenset[KindAndLength]:
    """Return the layers and lengths of rows whose attention Transformer Engine does clearly faster.

    All ranks call this, and get what rank 0 finds for its first micro-batch of each length from row
    g on: none for a deterministic run, whose attention Transformer Engine refuses from some size
    on.
    """
    hardware = config.hardware
    if hardware.deterministic or not by_transformer_engine(choose_backend(config.model, hardware)):
        return frozenset()
    found: set[KindAndLength] = set()
    if distributed.is_main_rank():
        settings = transformer_config(config.model, attention, hardware)
        for packed in _first_streams(loader, g, for_graphs=hardware.cuda_graphs):
            found |= chosen_layers(settings, attention, packed, device_alone=hardware.cuda_graphs)
    return distributed.broadcast(frozenset(found))


def chosen_layers(
    config: TransformerConfig, attention: Attention, packed: PackedRows, *, device_alone: bool
) -> set[KindAndLength]:
    """Time both kernels on a stream for a layer of each kind; return the kinds for the second.

    `device_alone` leaves out the time in which the host starts them, as a CUDA graph does.
    """
    found: set[KindAndLength] = set()
    layers = {layer_kind(config, number): number for number in range(1, config.num_layers + 1)}
    for kind, number in layers.items():
        seconds = {}
        for name, kernel in KERNELS.items():
            core = kernel(
                config,
                number,
                ATTENTION_MASKS[attention],
                "self",
                pg_collection=ProcessGroupCollection.use_mpu_process_groups(["cp"]),
            )
            if serves(core):
                passes = attention_passes(core, packed)
                seconds[name] = median_seconds(
                    passes, untimed=UNTIMED, timed=TIMED, device_alone=device_alone
                )
        name = fastest(seconds)
        numbers = ", ".join(f"{each} {1e3 * took:.2f} ms" for each, took in seconds.items())
        length = packed.max_seqlen_q
        logger.info("attention of %s layers, rows of %d: %s (%s)", kind, length, name, numbers)
        if name == "transformer_engine":
            found.add((kind, length))
    return found


def attention_passes(core: CoreAttention, packed: PackedRows) -> Callable[[], None]:
    """Return a function that goes forward and backward through a rank's share of the heads."""
    config = core.config
    heads = config.num_attention_heads // (
        config.tensor_model_parallel_size * config.context_parallel_size
    )
    assert packed.position_ids is not None
    device = packed.cu_seqlens_q.device
    slots, size, dtype = len(packed.position_ids), config.kv_channels, config.params_dtype
    inputs = random_projection(slots, heads, size, dtype=dtype, device=device)
    gradient = torch.randn(slots, heads, size, dtype=dtype, device=device)

    def passes() -> None:
        out = core.attend(*inputs, packed)
        torch.autograd.grad(out, inputs, gradient)

    return passes


def serves(core: CoreAttention) -> bool:
    """Tell whether a kernel can be run here for a layer."""
    if not isinstance(core, TransformerEngineCoreAttention):
        return True
    return transformer_engine_attends(
        core.heads, core.config.kv_channels, is_causal=core.is_causal, window=core.window
    )


def _first_streams(loader: Loader, g: int, *, for_graphs: bool) -> Iterator[PackedRows]:
    """Yield the segments of this rank's first micro-batch of each length of rows, from row g on."""
    seen: set[int] = set()
    for phase in loader.order.spec.phases:
        if phase.end_g > g and phase.seq_length not in seen:
            seen.add(phase.seq_length)
            batch = next(loader.micro_batches(max(g, phase.start_g), phase.end_g))
            yield _stream(batch.rows, for_graphs=for_graphs)


def _stream(rows: Rows, *, for_graphs: bool) -> PackedRows:
    """Return the segments of rows on this rank's device, as training hands them to the layers."""
    device = distributed.device()
    borders = segment_boundaries(rows.cu_seqlens, powers_of_two=for_graphs)
    boundaries = torch.from_numpy(borders).to(device)
    positions = torch.from_numpy(rows.position_ids).to(device)
    return PackedRows.of(
        boundaries, rows.seq_length, positions, torch.from_numpy(rows.g).to(device)
    )
