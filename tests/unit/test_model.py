"""The model: published parameter counts, layout of layers, initial weights."""

import dataclasses
import itertools
import threading

import pytest
import torch

from benchmarks.model_sizes import SIZES, model_of_size
from megatron_ettin.config import HardwareConfig, ModelConfig, SeedConfig
from megatron_ettin.model import counts, provider, weight_map
from megatron_ettin.model.initialize import initial_tensor, local_shard
from megatron_ettin.model.layer_spec import GatedGelu
from megatron_ettin.model.provider import (
    Attention,
    build_model,
    build_stage,
    logical_parameters,
    transformer_config,
)
from tests.published import PARAMETERS

TINY = ModelConfig(
    num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, vocab_size=100
)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("one_process")
def test_every_size_has_the_parameters_of_the_formula(size: str, attention: Attention) -> None:
    model = model_of_size(size)
    with torch.device("meta"):
        stage = build_stage(model, attention, HardwareConfig(), SeedConfig())
    found = sum(parameter.numel() for parameter in stage.parameters())
    padding = (model.padded_vocab_size - model.vocab_size) * (model.hidden_size + 1)
    assert found == counts.parameters(model).total + padding
    assert found == PARAMETERS.get(size, found)


@pytest.mark.parametrize("size", SIZES)
def test_the_weight_map_has_the_parameters_of_the_formula(size: str) -> None:
    model = model_of_size(size)
    shapes = [
        weight_map.huggingface_shape(entry, model)
        for entry in weight_map.entries(model.num_layers).values()
    ]
    assert sum(torch.Size(shape).numel() for shape in shapes) == counts.parameters(model).total


@pytest.mark.usefixtures("one_process")
def test_every_parameter_has_one_entry_and_its_shape() -> None:
    stage = build_stage(TINY, "causal", HardwareConfig(), SeedConfig())
    entries = weight_map.entries(TINY.num_layers)
    named = dict(logical_parameters(stage))
    assert sorted(named) == sorted(entries)
    for name, parameter in named.items():
        assert initial_tensor(entries[name], TINY, seed=0).shape == parameter.shape


@pytest.mark.usefixtures("one_process")
def test_layers_0_3_6_are_global_and_windows_follow_the_objective() -> None:
    model = model_of_size("17m")
    for attention, window in (("bidirectional", (64, 64)), ("causal", (64, 0))):
        stage = build_stage(model, attention, HardwareConfig(), SeedConfig())  # type: ignore[arg-type]
        cores = [layer.self_attention.core_attention for layer in stage.decoder.layers]
        assert [core.window for core in cores] == [
            None if layer % 3 == 0 else window for layer in range(7)
        ]


@pytest.mark.usefixtures("one_process")
def test_the_mlp_multiplies_the_exact_gelu_by_the_other_half() -> None:
    mlp = build_model(TINY, "causal", HardwareConfig(), SeedConfig()).decoder.layers[1].mlp
    assert isinstance(mlp.activation_func, GatedGelu)
    hidden = torch.randn(5, 1, TINY.hidden_size, generator=torch.Generator().manual_seed(1))
    output, bias = mlp(hidden)
    first, second = (layer.weight.double() for layer in (mlp.linear_fc1, mlp.linear_fc2))
    x, gate = (hidden.double() @ first.t()).chunk(2, dim=-1)
    expected = (x * (1 + torch.erf(x / 2**0.5)) / 2 * gate) @ second.t()
    assert bias is None
    assert torch.allclose(output.double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.usefixtures("one_process")
def test_twins_start_from_the_same_weights() -> None:
    encoder = build_model(TINY, "bidirectional", HardwareConfig(), SeedConfig(init=5))
    decoder = build_model(TINY, "causal", HardwareConfig(), SeedConfig(init=5))
    other = build_model(TINY, "causal", HardwareConfig(), SeedConfig(init=6))
    for (name, one), (_, two) in zip(
        logical_parameters(encoder), logical_parameters(decoder), strict=True
    ):
        assert torch.equal(one, two), name
    assert not torch.equal(
        encoder.embedding.word_embeddings.weight, other.embedding.word_embeddings.weight
    )


@pytest.mark.usefixtures("one_process")
def test_all_threads_draw_initial_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    both, calls = threading.Barrier(2), itertools.count()

    def drawn(entry: weight_map.Entry, model: ModelConfig, seed: int) -> torch.Tensor:
        if next(calls) < 2:
            both.wait(timeout=20)  # breaks where one thread draws one tensor after the other
        return initial_tensor(entry, model, seed)

    monkeypatch.setattr(provider, "initial_tensor", drawn)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        build_model(model_of_size("nano"), "causal", HardwareConfig(), SeedConfig())
    finally:
        torch.set_num_threads(before)
    assert next(calls) > 2
    assert not both.broken


def test_initial_weights_have_the_published_spread() -> None:
    model = model_of_size("17m")
    entries = weight_map.entries(model.num_layers)
    # A normal cut at two standard deviations has 0.8796 of its spread.
    for name, std in (
        ("embedding.word_embeddings.weight", 0.02),
        ("decoder.layers.4.mlp.linear_fc1.weight", 0.02),
        ("decoder.layers.4.mlp.linear_fc2.weight", 0.02 / (2 * 7) ** 0.5),
        ("decoder.layers.4.self_attention.linear_proj.weight", 0.02 / (2 * 7) ** 0.5),
    ):
        values = initial_tensor(entries[name], model, seed=0)
        assert values.abs().max() <= 2 * std
        assert float(values.std()) == pytest.approx(0.8796 * std, rel=0.01)
    bias = initial_tensor(entries["output_layer.bias"], model, seed=0)
    assert bias.abs().max() <= 1 / 16
    assert float(bias.std()) == pytest.approx(1 / 16 / 3**0.5, rel=0.02)
    assert (initial_tensor(entries["embedding.norm.weight"], model, seed=0) == 1).all()


def test_tensor_parallel_shards_make_up_the_whole() -> None:
    whole = torch.arange(48.0).view(12, 4)
    for dim, stride in ((0, 1), (0, 2), (1, 1)):
        parameter = torch.nn.Parameter(torch.empty(0))
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.partition_dim = dim  # type: ignore[attr-defined]
        parameter.partition_stride = stride  # type: ignore[attr-defined]
        shards = [local_shard(whole, parameter, rank, 2) for rank in range(2)]
        halves = [torch.chunk(shard, stride, dim) for shard in shards]
        together = [half for part in zip(*halves, strict=True) for half in part]
        assert torch.equal(torch.cat(together, dim), whole)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"hiden_size": 3}, r"no field \['hiden_size'\]"),
        # Ettin's layer would not read it.
        ({"hidden_dropout": 0.1}, r"\['hidden_dropout'\] would change nothing"),
    ],
)
def test_megatron_overrides_without_effect_are_refused(
    override: dict[str, float], message: str
) -> None:
    model = dataclasses.replace(TINY, megatron_overrides=override)
    with pytest.raises(ValueError, match=message):
        transformer_config(model, "causal", HardwareConfig())


def test_uneven_pipeline_stages_hold_all_layers() -> None:
    model = model_of_size("17m")
    config = transformer_config(model, "causal", HardwareConfig(pipeline_parallel_size=2))
    assert config.num_layers_in_last_pipeline_stage == 3
    config = transformer_config(
        model_of_size("400m"), "causal", HardwareConfig(pipeline_parallel_size=8)
    )
    assert config.num_layers_in_last_pipeline_stage == 7
