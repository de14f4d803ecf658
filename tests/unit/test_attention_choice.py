"""Layers that Transformer Engine's attention gets: those that it was measured to do faster."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig, ModelConfig
from megatron_ettin.model.attention import PackedRows, SdpaCoreAttention
from megatron_ettin.model.provider import transformer_config
from megatron_ettin.training import attention_choice
from megatron_ettin.training.attention_choice import chosen_layers, layers_of_transformer_engine
from tests.conftest import TinyCorpus
from tests.training import tiny_loader

MODEL = ModelConfig(
    num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, sliding_window=8
)


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with distributed.process_groups(HardwareConfig()):
        yield


class Slow(SdpaCoreAttention):
    """Attention that takes 30 ms longer."""

    def attend(self, *inputs: Any) -> torch.Tensor:
        time.sleep(0.03)
        return super().attend(*inputs)


class SlowInGlobalLayers(Slow):
    """Attention that takes longer where there is no window."""

    def attend(self, *inputs: Any) -> torch.Tensor:
        return super().attend(*inputs) if self.window is None else super(Slow, self).attend(*inputs)


class SlowInLocalLayers(Slow):
    """Attention that takes longer where there is a window."""

    def attend(self, *inputs: Any) -> torch.Tensor:
        return super().attend(*inputs) if self.window else super(Slow, self).attend(*inputs)


@pytest.mark.parametrize(
    ("torchs", "engines", "expected"),
    [
        (SlowInGlobalLayers, SlowInLocalLayers, {("global", 48)}),
        (SlowInLocalLayers, SlowInGlobalLayers, {("local", 48)}),
        (Slow, SdpaCoreAttention, {("global", 48), ("local", 48)}),
        (SdpaCoreAttention, Slow, set()),
    ],
)
def test_a_kind_of_layer_gets_the_kernel_that_is_clearly_faster(
    torchs: Any, engines: Any, expected: set[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = {"torch": torchs, "transformer_engine": engines}
    monkeypatch.setattr(attention_choice, "KERNELS", kernels)
    monkeypatch.setattr(attention_choice, "TIMED", 3)
    borders = torch.tensor([0, 20, 48], dtype=torch.int32)
    packed = PackedRows.of(borders, 48, torch.zeros(48), torch.zeros(1))
    config = transformer_config(MODEL, "causal", HardwareConfig())
    assert chosen_layers(config, "causal", packed, device_alone=False) == expected


def test_the_measurement_is_of_the_runs_own_first_micro_batch_of_each_length(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, loader = tiny_loader(tiny_corpus, tmp_path, "MaskedLM")
    measured: list[PackedRows] = []

    def chosen(
        settings: Any, attention: Any, packed: PackedRows, *, device_alone: bool
    ) -> set[tuple[str, int]]:
        measured.append(packed)
        assert not device_alone  # without graphs the host starts the kernels
        return {("local", packed.max_seqlen_q)}

    monkeypatch.setattr(attention_choice, "chosen_layers", chosen)
    monkeypatch.setattr(attention_choice, "choose_backend", lambda *_: "transformer_engine")
    first, second = loader.order.spec.phases
    assert first.seq_length != second.seq_length
    for g, phases in ((first.end_g - 1, [first, second]), (second.start_g + 1, [second])):
        measured.clear()
        found = layers_of_transformer_engine(config, "bidirectional", loader, g)
        assert found == {("local", phase.seq_length) for phase in phases}
        for packed, phase in zip(measured, phases, strict=True):
            begin = max(g, phase.start_g)
            rows = next(loader.micro_batches(begin, phase.end_g)).rows
            assert packed.cu_seqlens_q.unique().tolist() == sorted(set(rows.cu_seqlens.tolist()))
            assert packed.max_seqlen_q == phase.seq_length
            assert int(packed.g[0]) == begin
    # After the last row there is nothing to measure.
    measured.clear()
    end = loader.order.num_rows
    assert layers_of_transformer_engine(config, "bidirectional", loader, end) == frozenset()
    assert measured == []


@pytest.mark.parametrize(
    ("deterministic", "backend"), [(True, "transformer_engine"), (False, "local")]
)
def test_nothing_is_measured_for_a_deterministic_run_or_without_transformer_engine(
    deterministic: bool,
    backend: str,
    tiny_corpus: TinyCorpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, loader = tiny_loader(tiny_corpus, tmp_path, "MaskedLM")
    hardware = dataclasses.replace(config.hardware, deterministic=deterministic)
    monkeypatch.setattr(attention_choice, "choose_backend", lambda *_: backend)
    monkeypatch.setattr(attention_choice, "chosen_layers", lambda *_: pytest.fail("measured"))
    config = dataclasses.replace(config, hardware=hardware)
    assert layers_of_transformer_engine(config, "causal", loader, 0) == frozenset()
