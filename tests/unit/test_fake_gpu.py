"""On a GPU that is not there: every backward pass, what a layer launches, and no wait."""

from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.fake_gpu import GPU, fake_gpu
from benchmarks.step_prediction import GpuRates, launches, predict, seconds
from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig, ModelConfig, SeedConfig
from megatron_ettin.devices import GPUS
from megatron_ettin.estimate.memory import Work, layer_activations
from megatron_ettin.model.attention import PackedRows
from megatron_ettin.model.provider import build_stage
from megatron_ettin.training.adamw import StableAdamW, TensorStatistics

SLOTS, ROW = 1024, 256
#: What a layer launches, forward and backward: four linears of three matmuls each, two norms. Torch
#: adds up the partial sums of a norm's weight and rounds them.
OF_A_LAYER = {
    **{"mm": 12, "forward_rows": 2, "backward_rows": 2, "sum": 2, "_to_copy": 2},
    **{"rotate_rows": 1, "pack_rows": 1, "multiply": 1, "differentiate": 1},
    **{"_flash_attention_forward": 1, "_flash_attention_backward": 1},
}


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with distributed.process_groups(HardwareConfig()):
        yield


def model_of(layers: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=128,
        ffn_hidden_size=192,
        num_attention_heads=2,
        vocab_size=1000,
        attention_output_dropout=0.1,
    )


def loss_on_gpu(attention: Any, layers: int = 4) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a model and its loss at a third of the slots."""
    settings = HardwareConfig(precision="bf16")
    stage = build_stage(model_of(layers), attention, settings, SeedConfig()).train()

    def new(count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, device=GPU)

    packed = PackedRows.of(new(9, torch.int32), ROW, new(SLOTS), new(SLOTS // ROW))
    weights = new(SLOTS // 3, torch.float32)
    loss = stage(new(SLOTS), packed, new(SLOTS // 3), new(SLOTS // 3), weights)
    return stage, loss.total


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_every_parameter_gets_a_gradient_of_its_shape_and_type(attention: Any) -> None:
    with fake_gpu() as noted:
        stage, loss = loss_on_gpu(attention)
        loss.backward()
    assert loss.shape == ()
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape, name
        assert parameter.grad.dtype == parameter.dtype == torch.bfloat16, name
    by_name = Counter(launch.name for launch in noted.noted)
    assert by_name["_flash_attention_forward"] == by_name["rotate_rows"] == 4
    assert by_name["_flash_attention_backward"] == by_name["pack_rows"] == 4


def test_what_a_layer_launches() -> None:
    three, six = (
        Counter(one.name for one in launches(model_of(layers), "bidirectional", SLOTS, ROW))
        for layers in (3, 6)
    )
    assert {name: count / 3 for name, count in (six - three).items()} == OF_A_LAYER


class AttentionInputs(TorchDispatchMode):
    """Keeps the queries, keys and values of the first attention."""

    inputs: tuple[torch.Tensor, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "_flash_attention_forward":
            self.inputs = self.inputs or args[:3]
        return func(*args, **(kwargs or {}))


def test_the_attention_reads_the_projection_itself() -> None:
    with fake_gpu(), AttentionInputs() as seen:
        loss_on_gpu("causal")
    query, key, value = seen.inputs
    # [t, heads, (q, k, v), size] of 128 channels in 2 heads.
    assert {x.stride() for x in seen.inputs} == {(3 * 128, 3 * 64, 1)}
    assert [x.storage_offset() for x in (query, key, value)] == [0, 64, 128]
    assert query.untyped_storage().nbytes() == SLOTS * 3 * 128 * 2


def test_a_wait_is_refused() -> None:
    with fake_gpu() as noted:
        count = torch.ones(3, device=GPU)
        for wait in (count.sum().item, count.nonzero, lambda: count[count > 0]):
            with pytest.raises((RuntimeError, NotImplementedError)):
                wait()
        assert count.is_cuda
    assert not torch.ones(3).is_cuda
    assert noted.noted


def test_a_predicted_layer_moves_what_its_parts_do() -> None:
    """Hidden states of h and MLP channels of f, in bf16, of the 17M model."""
    h, f = 256, 384
    norms = 2 * 4 * h + (2 * 4 + 1) * h  # forward; backward, once with dropout
    rotation = 4 * h + 6 * h
    linears = 3 * ((h + 3 * h) + (h + h) + (h + 2 * f) + (f + h))
    activation, attention = 3 * f + 5 * f, 4 * h + 8 * h
    found = predict("17m", "bidirectional", 65_536, GpuRates())
    expected = 2 * (norms + rotation + linears + activation + attention)
    # Weights, and two numbers of a row or head, are 1 % beside this.
    assert found.bytes_per_layer == pytest.approx(expected, rel=0.01)
    assert found.launches_per_layer == sum(OF_A_LAYER.values())


def test_a_launch_takes_as_long_as_its_slower_side() -> None:
    (matmul, *_) = [one for one in launches(model_of(3), "causal", SLOTS, ROW) if one.name == "mm"]
    assert matmul.flops == 2 * SLOTS * 3 * 128 * 128
    slow_memory = GpuRates(bytes_per_second=1.0, gap_seconds=0.0)
    assert seconds(matmul, "causal", slow_memory) == matmul.num_bytes
    assert matmul.num_bytes == 2 * (SLOTS * 128 + 3 * 128 * 128 + SLOTS * 3 * 128)
    slow_cores = GpuRates(matmul_flops=2.0, gap_seconds=5.0)
    assert seconds(matmul, "causal", slow_cores) == matmul.flops / 2.0 + 5.0


def kept_bytes(layers: int) -> int:
    """Return the bytes that autograd keeps for the backward pass, weights left out."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with fake_gpu(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stage, _ = loss_on_gpu("bidirectional", layers)
    weights = {weight.untyped_storage()._cdata for weight in stage.parameters()}
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in weights)


def test_layers_keep_what_the_estimate_says() -> None:
    work = Work(
        model=model_of(6),
        attention="bidirectional",
        hardware=HardwareConfig(precision="bf16"),
        world_size=1,
        slots=SLOTS,
        scored=SLOTS // 3,
        micro_batches=1,
        moments=2,
        device=GPUS["h200"],
    )
    estimated = sum(layer_activations(work, layer) for layer in (3, 4, 5))
    assert kept_bytes(6) - kept_bytes(3) == pytest.approx(estimated, rel=0.02)


class Scalars(TorchDispatchMode):
    """Counts tensors without a dimension that go into an operation on a list of tensors."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.startswith("_foreach"):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.found += sum(x.dim() == 0 for x in tensors)
        return func(*args, **(kwargs or {}))


def test_the_update_of_a_block_runs_no_kernel_for_each_slice() -> None:
    """Operations on lists take one kernel for all of them only if their shapes are equal."""
    with fake_gpu() as noted, Scalars() as scalars:
        weights = [torch.nn.Parameter(torch.empty(n, device=GPU)) for n in (5, 7, 11)]
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer = StableAdamW(
            [{"params": weights, "wd_mult": 1.0}],
            **{"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01},
        )
        optimizer.statistics = TensorStatistics(
            tensor_index={id(weight): i for i, weight in enumerate(weights)},
            counted={id(weight): True for weight in weights},
            numel=torch.empty(3, dtype=torch.float64, device=GPU),
            group=distributed.world_group(),
        )
        optimizer.initialize_state()
        optimizer.param_groups[0]["step"] = 1
        # One rank: there is nothing to send.
        with mock.patch("torch.distributed.all_reduce"), torch.no_grad():
            optimizer.update()
    assert scalars.found == 0
    assert any(launch.name.startswith("_foreach") for launch in noted.noted)
