"""Memory of a rank by part, in bytes: what is kept for a run's length, and a step's working set.

The activations are what autograd keeps for the backward pass, tensor by tensor, of the layers in
`model/layer_spec.py` and the attention in `model/attention.py`. tests/unit/test_estimate.py counts
them in a real forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ettin.config import HardwareConfig, ModelConfig
from megatron_ettin.devices import Device
from megatron_ettin.model.counts import Attention, layer_matrix_parameters

FP32 = 4
#: Bytes of a chunk of logits (model/linear_cross_entropy.py, which imports torch).
LOGITS_CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**30}
#: Elements that the optimizer updates at a time (training/block_optimizer.py, which imports torch).
OPTIMIZER_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
#: On a CPU: what the C library has taken from the system and cannot use for the next tensor (freed
#: blocks between kept ones), as a share of the activations. Measured (docs/estimate.md).
CPU_HEAP_OVERHEAD = 0.9
#: Larger blocks come from the system and go back to it, one by one (glibc, M_MMAP_THRESHOLD).
CPU_HEAP_BLOCK_BYTES = 32 * 2**20
#: On a CPU: what twenty steps add to the libraries; code that is read in, buffers of MKL, blocks of
#: sizes that have not come up again. Measured too.
CPU_RUNNING_BYTES = 75_000_000
#: And in 16 bits, the products that oneDNN keeps (distributed.py bounds their number).
CPU_KERNELS_BYTES = 200_000_000


@dataclass(frozen=True, kw_only=True)
class Work:
    """Model, layout and micro-batch whose memory is estimated."""

    model: ModelConfig
    attention: Attention
    hardware: HardwareConfig
    world_size: int
    slots: int
    """Slots of a micro-batch, over all ranks that share it."""
    scored: int
    """Scored positions of a micro-batch."""
    micro_batches: int
    """Micro-batches of a rank in a step."""
    moments: int
    """Tensors that the optimizer keeps beside each weight."""
    device: Device

    @property
    def bytes_per_element(self) -> int:
        """Bytes of a weight or an activation."""
        return FP32 if self.hardware.parameter_precision == "fp32" else 2

    @property
    def optimizer_shards(self) -> int:
        """Ranks that share the optimizer's state of the same weights."""
        hardware = self.hardware
        if not hardware.use_distributed_optimizer:
            return 1
        return self.world_size // (hardware.tensor_parallel_size * hardware.pipeline_parallel_size)

    @property
    def rank_slots(self) -> int:
        """Slots of a micro-batch that a rank's products take."""
        return self.slots // self.hardware.context_parallel_size

    @property
    def shared_slots(self) -> int:
        """Slots that a rank keeps between the layers' products."""
        return self.slots // self.hardware.slot_ranks

    @property
    def columns(self) -> int:
        """Columns of the output layer, or rows of the embedding, that a rank holds."""
        return self.model.padded_vocab_size // self.hardware.tensor_parallel_size


def largest_rank(work: Work) -> dict[str, int]:
    """Return the memory by part of the rank that needs most, which adds up to its peak."""
    stages = range(work.hardware.pipeline_parallel_size)
    return max(
        (rank_memory(work, stage) for stage in stages), key=lambda parts: sum(parts.values())
    )


def rank_memory(work: Work, stage: int) -> dict[str, int]:
    """Return the memory by part of a rank of pipeline stage `stage`, in bytes."""
    kept = _kept(work, stage)
    activations, dropout = _activations(work, stage)
    logits = _logits(work, stage)
    backward = _layer_gradients(work)
    during_backward = activations + dropout + max(logits, _output_gradients(work, stage) + backward)
    peak = max(during_backward, _embedding_gradients(work, stage), _optimizer_step(work, stage))
    runtime = work.device.runtime_bytes
    copy = 0
    if work.device.kind == "cpu":
        copy = _checkpoint_copy(work, stage)
        runtime += CPU_RUNNING_BYTES + _heap_overhead(work, activations)
        if work.bytes_per_element != FP32:
            runtime += CPU_KERNELS_BYTES
    return {
        **kept,
        "activations": activations,
        "dropout": dropout,
        "logits": logits,
        "rest_of_step": peak - activations - dropout - logits,
        "checkpoint_copy": copy,
        "runtime": runtime,
    }


def stage_layers(num_layers: int, stages: int, stage: int) -> range:
    """Return the layers of pipeline stage `stage`, counted from 0: the last holds the odd ones."""
    each = -(-num_layers // stages)
    if num_layers - each * (stages - 1) < 1:
        each = num_layers // stages
    first = each * stage
    return range(first, num_layers if stage == stages - 1 else first + each)


def rank_parameters(work: Work, stage: int) -> int:
    """Count the parameters on a rank of pipeline stage `stage`, padded columns included."""
    model, hardware = work.model, work.hardware
    h, stages = model.hidden_size, hardware.pipeline_parallel_size
    layers = stage_layers(model.num_layers, stages, stage)
    matrices = layer_matrix_parameters(model) // hardware.tensor_parallel_size
    count = len(layers) * (matrices + 2 * h) - (h if stage == 0 else 0)
    if stage == 0:
        count += work.columns * h + h
    if stage == stages - 1:
        count += h + h * h + h + work.columns
        if stages > 1:
            count += work.columns * h  # its own copy of the tied embedding
    return count


def _kept(work: Work, stage: int) -> dict[str, int]:
    parameters = rank_parameters(work, stage)
    own = -(-parameters // work.optimizer_shards)
    # In fp32 the optimizer updates views of the weights themselves.
    masters = 0 if work.hardware.parameter_precision == "fp32" else FP32 * own
    return {
        "weights": work.bytes_per_element * parameters,
        "gradients": FP32 * parameters,
        "master_weights": masters,
        "moments": work.moments * FP32 * own,
    }


def _checkpoint_copy(work: Work, stage: int) -> int:
    """Count what a save copies: weights in fp32 and two moments; in bf16 those weights too.

    The first data-parallel rank writes the moments of all.
    """
    weights = 0 if work.bytes_per_element == FP32 else work.bytes_per_element
    return (weights + 3 * FP32) * rank_parameters(work, stage)


def _activations(work: Work, stage: int) -> tuple[int, int]:
    """Return (activations, dropout factors) when the backward pass of a micro-batch begins."""
    stages = work.hardware.pipeline_parallel_size
    layers = stage_layers(work.model.num_layers, stages, stage)
    # One forward pass, one backward pass, in turns: the first stage is furthest ahead.
    in_flight = min(stages - stage, work.micro_batches)
    per_layer = [layer_activations(work, layer) for layer in layers]
    dropout = dropout_factors(work)
    if work.hardware.recomputes_layers:
        inputs = len(layers) * work.shared_slots * work.model.hidden_size * work.bytes_per_element
        return in_flight * (inputs + _around_layers(work, stage)) + max(per_layer), dropout
    around = _around_layers(work, stage)
    return in_flight * (sum(per_layer) + around), in_flight * len(layers) * dropout


def layer_activations(work: Work, layer: int) -> int:
    """Count what a layer keeps: its norms' and products' inputs, QKV, the attention, the MLP."""
    model, size = work.model, work.bytes_per_element
    channels = model.hidden_size // work.hardware.tensor_parallel_size
    heads = model.num_attention_heads // work.hardware.tensor_parallel_size
    norms = 1 if layer == 0 else 2
    shared = 2 * norms * model.hidden_size  # each norm's input and output
    if layer == 0:
        shared += model.hidden_size  # what QKV is made of
    rotation = 4 * model.head_size  # cosines and sines, for queries and for keys
    if work.device.kind == "cuda" and size != FP32:
        # The fused QKV, rotated in place, and outputs; one table of positions serves all layers.
        rotation, attention = 0, 4 * channels
    elif model.is_global(layer):
        # Queries, keys, the fused QKV that the values are a part of, outputs by document, together.
        attention = 7 * channels
    else:
        # Queries, outputs; keys and values with their neighbours.
        attention = (2 + 2 * _blocks_seen(work)) * channels
        if size != FP32 and work.device.kind == "cpu":
            # The weights of the softmax, in float32 and in the layer's type.
            weights = heads * _blocks_seen(work) * model.sliding_window
            attention += weights + FP32 * weights // size
    # Both halves of the first product, the second one's input; on a CPU the GELU too.
    mlp = (4 if work.device.kind == "cpu" else 3) * model.ffn_hidden_size
    mlp //= work.hardware.tensor_parallel_size
    shared += 2 * norms  # the norms' statistics
    elements = work.shared_slots * shared + work.rank_slots * (rotation + attention + mlp)
    return size * elements + FP32 * heads * work.rank_slots  # and those of the softmax


def _blocks_seen(work: Work) -> int:
    """Return how many blocks of a window's width a local layer's queries take keys from."""
    return 3 if work.attention == "bidirectional" else 2


def dropout_factors(work: Work) -> int:
    """Count a layer's factors: float32 from C++ on a CPU; on a GPU they are computed again."""
    if work.device.kind == "cuda" or not work.model.attention_output_dropout:
        return 0
    return FP32 * work.shared_slots * work.model.hidden_size


def _around_layers(work: Work, stage: int) -> int:
    """Count what a stage keeps outside its layers: a batch, rotary tables, block masks, norms."""
    model = work.model
    batch = 5 * 8 * work.slots
    tables = 2 * FP32 * model.head_size * work.rank_slots
    masks = FP32 * _blocks_seen(work) * model.sliding_window * work.rank_slots
    hidden = work.bytes_per_element * model.hidden_size
    kept = batch + tables + masks
    if stage == 0:
        kept += hidden * work.shared_slots
    if stage == work.hardware.pipeline_parallel_size - 1:
        kept += hidden * work.shared_slots
        # The head's product, activation and norm, and the gradient that the loss leaves behind.
        kept += 5 * hidden * _scored(work)
    return kept


def _is_last(work: Work, stage: int) -> bool:
    return stage == work.hardware.pipeline_parallel_size - 1


def _output_gradients(work: Work, stage: int) -> int:
    """Count the gradients of the output layer's weight and bias: sums over chunks are float32."""
    if not _is_last(work, stage):
        return 0
    size = FP32 if _scored(work) > _chunk_positions(work) else work.bytes_per_element
    return work.columns * (size * work.model.hidden_size + FP32)


def _scored(work: Work) -> int:
    return work.scored // work.hardware.context_parallel_size


def _chunk_positions(work: Work) -> int:
    """Return the positions whose logits exist at once."""
    row = work.bytes_per_element * work.columns
    return min(_scored(work), LOGITS_CHUNK_BYTES[work.device.kind] // row)


def _logits(work: Work, stage: int) -> int:
    """Count a chunk of logits, and the gradient of the output's weight."""
    if not _is_last(work, stage):
        return 0
    chunk = work.bytes_per_element * _chunk_positions(work) * work.columns
    if work.bytes_per_element != FP32 and _scored(work) > _chunk_positions(work):
        # A chunk's product before it is added.
        chunk += work.bytes_per_element * work.columns * work.model.hidden_size
    return chunk + _output_gradients(work, stage)


def _layer_gradients(work: Work) -> int:
    """Count the gradients inside a layer's MLP, while all that the layer keeps is still there."""
    hardware, model = work.hardware, work.model
    mlp = 5 * work.rank_slots * model.ffn_hidden_size // hardware.tensor_parallel_size
    return work.bytes_per_element * (mlp + 2 * work.shared_slots * model.hidden_size)


def _embedding_gradients(work: Work, stage: int) -> int:
    """Count the tied embedding's gradients at the end of the backward pass, before they meet."""
    if stage != 0:
        return 0
    both = 2 if _is_last(work, stage) else 1
    return both * work.bytes_per_element * work.columns * work.model.hidden_size


def _optimizer_step(work: Work, stage: int) -> int:
    """Count two copies of a block of shards: the update, and the root that it is divided by."""
    own = -(-rank_parameters(work, stage) // work.optimizer_shards)
    return 2 * FP32 * min(own, OPTIMIZER_BLOCK_ELEMENTS[work.device.kind])


def _heap_overhead(work: Work, activations: int) -> int:
    """Count what a CPU's heap takes beyond the activations, if they come from it."""
    block = work.bytes_per_element * work.shared_slots * work.model.hidden_size
    return int(CPU_HEAP_OVERHEAD * activations) if block <= CPU_HEAP_BLOCK_BYTES else 0
