"""Types of the tensors of a tensor-parallel stage, checked by spmd_types without any other rank.

A tensor is replicated with gradients to be summed (R), replicated with equal gradients (I), or
different on each rank (V, S). spmd_types follows the types through a forward pass and refuses
mixtures whose gradients would be wrong. Megatron-Core's collectives are declared here.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import layers, mappings
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ettin import cpu
from megatron_ettin.config import HardwareConfig, ModelConfig, SeedConfig
from megatron_ettin.model.attention import PackedRows
from megatron_ettin.model.provider import build_model
from tests.integration.planted_faults import FAULTS

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, vocab_size=512
)
SLOTS = 64


def main(faults: list[str], found: Path) -> None:
    """Write what is said of both layouts, and of each fault under sequence parallelism."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    cpu.adapt_megatron()
    parallel_state.initialize_model_parallel(2, create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    declare_collectives()
    verdicts = {"tp2": verdict(is_sequence_parallel=False)}
    verdicts["tp2sp"] = verdict(is_sequence_parallel=True)
    for fault in (fault for fault in FAULTS if fault.what in faults):
        with pytest.MonkeyPatch.context() as patch:
            fault.plant(patch, [])
            verdicts[fault.what] = verdict(is_sequence_parallel=True)
    found.write_text(json.dumps(verdicts))


def declare_collectives() -> None:
    """Tell spmd_types what Megatron-Core's functions do to types, gradients included."""
    rules, types = import_module("spmd_types.rules"), import_module("spmd_types")
    share, equal, addend = types.S, types.I, types.P

    def reduce(*, input_: Any, group: Any) -> Any:
        addends = rules.reinterpret(input_, group, src=types.V, dst=addend)
        return rules.all_reduce(addends, group, src=addend, dst=equal)

    def scatter(*, input_: Any, group: Any) -> Any:
        return rules.convert(input_, group, src=equal, dst=share(0))

    def reduce_scatter(*, input_: Any, group: Any) -> Any:
        addends = rules.reinterpret(input_, group, src=types.V, dst=addend)
        return rules.reduce_scatter(addends, group, src=addend, dst=share(0))

    def gather(*, input_: Any, group: Any, tensor_parallel_output_grad: bool = True) -> Any:
        gathered = types.R if tensor_parallel_output_grad else equal
        return rules.all_gather(input_, group, src=share(0), dst=gathered)

    def gather_columns(*, input_: Any, group: Any) -> Any:
        return rules.all_gather(input_, group, src=share(2), dst=equal)

    for function, rule in (
        (mappings._ReduceFromModelParallelRegion, reduce),
        (mappings._ScatterToSequenceParallelRegion, scatter),
        (mappings._ReduceScatterToSequenceParallelRegion, reduce_scatter),
        (mappings._GatherFromSequenceParallelRegion, gather),
        (mappings._GatherFromModelParallelRegion, gather_columns),
        (layers.LinearWithGradAccumulationAndAsyncCommunication, linear),
    ):
        function.spmd_typecheck = staticmethod(rule)


def linear(
    *,
    input: Any,  # noqa: A002 (a rule names arguments as Megatron-Core does)
    weight: Any,
    bias: Any,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Any,
) -> Any:
    """Return the type of a linear's output; its weight may be divided by rows or columns."""
    rules, types = import_module("spmd_types.rules"), import_module("spmd_types")
    x = input
    if bias is not None:
        rules.ignore(bias)
    if sequence_parallel:
        x = rules.all_gather(x, tp_group, src=types.S(0), dst=types.R)
    elif allreduce_dgrad:
        x = rules.reinterpret(x, tp_group, src=types.I, dst=types.R)
    return rules.einsum("sbi,oi->sbo", x, weight)


def verdict(*, is_sequence_parallel: bool) -> str:
    """Return what spmd_types has against a forward pass; nothing if the types agree."""
    types = import_module("spmd_types")
    hardware = HardwareConfig(
        tensor_parallel_size=2, sequence_parallel=is_sequence_parallel, precision="fp32"
    )
    stage: Any = build_model(MODEL, "bidirectional", hardware, SeedConfig()).eval()
    borders, slots = torch.tensor([0, SLOTS], dtype=torch.int32), torch.arange(SLOTS)
    tokens = torch.arange(SLOTS)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    group = mesh.get_group("tp")
    with (
        types.set_current_mesh(mesh),
        import_module("spmd_types.checker").typecheck(),
    ):
        for parameter in stage.parameters():
            types.assert_type(parameter, {group: type_of(parameter)})
        for equal in (tokens, borders):
            types.assert_type(equal, {group: types.I})
        types.assert_type(slots, {group: types.R})
        try:
            with pytest.MonkeyPatch.context() as patch:
                type_rotations(patch, group)
                stage(tokens, PackedRows.of(borders, SLOTS, slots, torch.tensor([0])))
        except types.SpmdTypeError as error:
            return str(error).splitlines()[0]
    return ""


def type_rotations(patch: pytest.MonkeyPatch, group: Any) -> None:
    """Type the frequencies of rotations as they are used: they are no parameters."""
    types, original = import_module("spmd_types"), RotaryEmbedding.forward

    def typed(rotary: Any, *args: Any, **kwargs: Any) -> Any:
        types.assert_type(rotary.inv_freq, {group: types.R})
        return original(rotary, *args, **kwargs)

    patch.setattr(RotaryEmbedding, "forward", typed)


def type_of(parameter: torch.nn.Parameter) -> Any:
    """Return the type that Megatron-Core's marks give a parameter: they decide who sums what."""
    types = import_module("spmd_types")
    if getattr(parameter, "tensor_model_parallel", False):
        return types.V
    return types.R if getattr(parameter, "sequence_parallel", False) else types.I
