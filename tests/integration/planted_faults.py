"""The faults of the mutation test, by layout."""

import torch
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.tensor_parallel import layers, mappings

from megatron_ettin import distributed, native
from megatron_ettin.data.loader import Loader
from megatron_ettin.model import attention, ettin_model, layer_spec, linear_cross_entropy, provider
from megatron_ettin.training import preparation
from tests.faults import (
    Effect,
    Fault,
    alone,
    changed,
    data_ranks,
    dropout_at,
    dropout_by_place,
    exchange_nothing,
    first_share,
    halved,
    in_group,
    instead,
    labels_of_first,
    leave_out,
    marked,
    neighbours_share,
    no_borders_on_last,
    own_addend,
    own_copies,
    plain_shard,
    positions_of_first,
    rotation_by_place,
    shifted_vocabulary,
    twice,
    wider_on_last,
    with_arguments,
)

LINEAR = "LinearWithGradAccumulationAndAsyncCommunication"
HEAD = "_LinearCrossEntropy.forward"
NORMS = "_allreduce_non_tensor_model_parallel_grads"
TIED = "_allreduce_embedding_grad"
TOKENS = "finalize_model_grads"
BUFFERS = "_ParamAndGradBucketGroup.start_grad_sync"


def summed(layout: str, what: str, caller: str, effect: Effect) -> Fault:
    """Return a fault of the all-reduce that `caller` runs."""
    return Fault(layout, what, torch.distributed, "all_reduce", effect, caller)


FAULTS = [
    # Tensor parallelism.
    summed("tp2dp2", "row-parallel sum left out", "_reduce", leave_out),
    summed("tp2dp2", "row-parallel sum doubled", "_reduce", twice),
    summed("tp2dp2", "row-parallel sum halved", "_reduce", halved),
    summed("tp2dp2", "row-parallel sum over the data ranks", "_reduce", in_group(data_ranks)),
    summed("tp2dp2", "column-parallel gradient not summed", f"{LINEAR}.backward", leave_out),
    summed("tp2dp2", "column-parallel gradient doubled", f"{LINEAR}.backward", twice),
    summed("tp2dp2", "head's gradient not summed", HEAD, leave_out),
    summed("tp2dp2", "head's gradient doubled", HEAD, twice),
    summed("tp2dp2", "head's gradient halved", HEAD, halved),
    Fault("tp2dp2", "softmax of each rank alone", linear_cross_entropy, "_over_ranks", alone),
    Fault(
        "tp2dp2",
        "vocabulary off by one",
        layers.VocabParallelEmbedding,
        "forward",
        shifted_vocabulary,
    ),
    Fault("tp2dp2", "gated halves divided as one", provider, "local_shard", plain_shard),
    Fault("tp2dp2", "window wider on one rank", attention, "layer_window", wider_on_last),
    Fault(
        "tp2dp2",
        "replicated tensors in every rank's norm",
        megatron_optimizer.tensor_parallel,
        "param_is_not_tensor_parallel_duplicate",
        instead(True),
    ),
    # The optimizer's state, shared by the data-parallel ranks.
    Fault(
        "tp2dp2",
        "gradients not reduce-scattered",
        param_and_grad_buffer,
        "dist_reduce_scatter_func",
        leave_out,
    ),
    Fault(
        "tp2dp2",
        "updated weights not gathered",
        param_and_grad_buffer,
        "dist_all_gather_func",
        leave_out,
    ),
    summed("tp2dp2", "RMS of StableAdamW doubled", "StableAdamW._damping", twice),
    summed("tp2dp2", "gradient norm not summed", "get_grad_norm_fp32", leave_out),
    # Sequence parallelism.
    Fault(
        "tp2cp2sp",
        "embedding scatters the first share to all",
        ettin_model,
        "scatter_to_sequence_parallel_region",
        first_share,
    ),
    Fault(
        "tp2cp2sp",
        "head's gathered gradient summed",
        ettin_model,
        "gather_from_sequence_parallel_region",
        with_arguments(tensor_parallel_output_grad=True),
    ),
    Fault("tp2cp2sp", "head not gathered", mappings, "dist_all_gather_func", own_copies),
    Fault("tp2cp2sp", "layer's input not gathered", layers, "dist_all_gather_func", own_copies),
    Fault(
        "tp2cp2sp",
        "layer's output scattered without a sum",
        mappings,
        "dist_reduce_scatter_func",
        own_addend,
    ),
    Fault(
        "tp2cp2sp",
        "layer's gradient scattered without a sum",
        layers,
        "dist_reduce_scatter_func",
        own_addend,
    ),
    summed("tp2cp2sp", "norms' gradients not summed", NORMS, leave_out),
    summed("tp2cp2sp", "norms' gradients doubled", NORMS, twice),
    Fault("tp2cp2sp", "norms unmarked", layer_spec.LayerNorm, "__init__", marked(False)),
    Fault("tp2cp2sp", "replicated head marked", layer_spec.LayerNorm, "__init__", marked(True)),
    summed("tp2cp2sp", "tokens not counted over context ranks", TOKENS, in_group(data_ranks)),
    # Pipeline parallelism, with recomputation.
    summed("tp2pp2sp", "tied gradients not summed", TIED, leave_out),
    summed("tp2pp2sp", "tied gradients doubled", TIED, twice),
    summed("tp2pp2sp", "tied gradients halved", TIED, halved),
    Fault(
        "tp2pp2sp",
        "tokens not told to the first stage",
        torch.distributed,
        "broadcast",
        leave_out,
        TOKENS,
    ),
    Fault(
        "tp2pp2sp",
        "rotation by the layer's place in its stage",
        layer_spec.EttinLayer,
        "forward",
        rotation_by_place,
    ),
    Fault(
        "tp2pp2sp",
        "dropout by the layer's place in its stage",
        native,
        "dropout_factors",
        dropout_at(lambda layer, first: (0, first)),
    ),
    Fault(
        "tp2pp2sp",
        "dropout forgets the sequence-parallel share",
        native,
        "dropout_factors",
        dropout_at(lambda layer, first: (layer, 0)),
    ),
    Fault(
        "tp2pp2sp",
        "last micro-batch dropped",
        Loader,
        "num_micro_batches",
        changed(lambda count: count - 1),
    ),
    # Context parallelism.
    Fault("cp2dp2", "slots not exchanged for heads", attention, "all_to_all", exchange_nothing),
    Fault(
        "cp2dp2",
        "heads come back in another order",
        attention,
        "_heads_for_slots",
        changed(lambda heads: heads.roll(1, dims=1)),
    ),
    Fault("cp2dp2", "slots of the neighbour", preparation, "local_slots", neighbours_share),
    Fault(
        "cp2dp2", "positions of the first rank", preparation, "make_micro_batch", positions_of_first
    ),
    Fault("cp2dp2", "labels of the first rank", preparation, "make_micro_batch", labels_of_first),
    Fault(
        "cp2dp2",
        "dropout forgets the context-parallel share",
        native,
        "dropout_factors",
        dropout_at(lambda layer, first: (layer, 0)),
    ),
    Fault(
        "cp2dp2",
        "one rank's documents see each other",
        attention.PackedRows,
        "block_mask",
        no_borders_on_last,
    ),
    summed("cp2dp2", "gradients not summed over context ranks", BUFFERS, in_group(data_ranks)),
    # Data parallelism, with idle rows.
    summed("dp4", "gradients not summed", BUFFERS, leave_out),
    summed("dp4", "gradients averaged", BUFFERS, halved),
    summed("dp4", "tokens not counted over data ranks", TOKENS, leave_out),
    Fault(
        "dp4",
        "every rank takes the first one's rows",
        distributed,
        "data_parallel",
        changed(lambda place: (0, place[1])),
        "build_loader",
    ),
    Fault("dp4", "dropout by the row's place", native, "dropout_factors", dropout_by_place),
]
