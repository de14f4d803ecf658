"""The attention's benchmark: documents as rows have them, and a figure for everything it names."""

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import attention_times
from benchmarks.attention_times import documents
from benchmarks.model_sizes import model_of_size
from megatron_ettin.model.attention import SdpaCoreAttention
from megatron_ettin.model.attention_gpu import (
    TransformerEngineCoreAttention,
    VarlenCoreAttention,
)
from tools import bench_attention


def test_documents_fill_rows_of_whole_segments() -> None:
    found = documents(4096, 1024, 200)
    assert found.dtype == np.int32
    assert len(found) == 4 * (1024 // 16 + 1) + 1
    lengths = np.diff(found)
    assert (lengths >= 0).all()
    assert lengths.sum() == 4096
    assert set(range(0, 4097, 1024)) <= set(found.tolist())  # no document crosses a row
    assert 100 < lengths[lengths > 0].mean() < 300


@pytest.mark.usefixtures("one_process")
def test_transformer_engine_gets_no_thousands_of_empty_segments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 4,160 segments its kernel takes seconds a pass, so that the benchmark might not end."""

    class Kernel(TransformerEngineCoreAttention):
        def __init__(self, *_: object, **__: object) -> None:
            torch.nn.Module.__init__(self)

    monkeypatch.setattr(attention_times, "TransformerEngineCoreAttention", Kernel)
    monkeypatch.setattr(attention_times, "serves", lambda _: True)
    monkeypatch.setattr(attention_times, "attention_passes", lambda *_: None)
    kinds = {"varlen": VarlenCoreAttention, "transformer_engine": Kernel}
    monkeypatch.setattr(attention_times, "_kernels", lambda: kinds)
    monkeypatch.setattr(attention_times, "_measured", lambda *_: {})
    borders = documents(2048, 1024, 200)
    found = attention_times.attention_times(model_of_size("nano"), "causal", borders, rounds=1)
    assert list(found) == ["varlen", "transformer_engine", "varlen with empty segments"]


def test_a_sized_run_of_the_benchmark_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_attention.py"])
    assert bench_attention.parse_arguments().rounds <= 5


def test_every_kernel_has_its_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--models", "nano", "--slots", "256", "--seq-length", "128", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_attention.py", *options, "--json"])
    bench_attention.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    reports = [json.loads(line) for line in lines]
    assert [(r["model"], r["attention"], r["slots"]) for r in reports] == [
        ("nano", "bidirectional", 256),
        ("nano", "causal", 256),
    ]
    for report in reports:
        assert set(report["times"]) == {"sdpa", "sdpa with empty segments"}
        for times in report["times"].values():
            assert {"global_ms", "local_ms"} <= set(times)
            assert min(times.values()) > 0.0


@pytest.mark.usefixtures("one_process")
def test_what_is_timed_lies_in_memory_as_a_layer_hands_it_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.Tensor] = []

    class Noted(SdpaCoreAttention):
        def attend(self, *inputs: Any) -> torch.Tensor:
            seen.extend(inputs[:3])
            return super().attend(*inputs)

    monkeypatch.setattr(attention_times, "_kernels", lambda: {"noted": Noted})
    model = model_of_size("nano")
    attention_times.attention_times(
        model, "causal", documents(256, 128, 50), rounds=1, with_empty=False
    )
    heads, size = model.num_attention_heads, model.head_size
    assert {x.shape for x in seen} == {(256, heads, size)}
    assert {x.stride() for x in seen} == {(3 * heads * size, 3 * size, 1)}
    assert [x.storage_offset() for x in seen[:3]] == [0, size, 2 * size]
    assert len({x.untyped_storage().data_ptr() for x in seen[:3]}) == 1
