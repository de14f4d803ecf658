"""Precision auto: what is chosen from which times, that it is measured, and that it is kept."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from megatron_ettin import distributed
from megatron_ettin.config import (
    DataConfig,
    HardwareConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    RunConfig,
)
from megatron_ettin.objectives import CausalLM
from megatron_ettin.training import precision

CONFIG = RunConfig(
    objective=CausalLM(),
    model=ModelConfig(
        num_layers=5, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, sliding_window=8
    ),
    phases=[PhaseConfig(name="only", train_tokens=1000, seq_length=32, global_batch_size=2)],
    data=DataConfig(tokenizer="none", sources={}, blend={"only": {}}),
    optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0),
    run_dir="none",
    hardware=HardwareConfig(precision="auto", micro_batch_tokens=64),
)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="measures a CPU")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of verdicts, of a machine whose processors know bf16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_info = tmp_path / "cpuinfo"
    cpu_info.write_text("model name : toy\nflags : fpu avx512_bf16\n")
    monkeypatch.setattr(precision, "CPU_INFO", cpu_info)
    return tmp_path / "megatron_ettin"


def test_a_narrower_precision_must_be_clearly_faster() -> None:
    assert precision.fastest({"bf16": 1.0, "fp8 tensorwise": 0.96}) == "bf16"
    assert precision.fastest({"bf16": 1.0, "fp8 tensorwise": 0.94}) == "fp8 tensorwise"
    times = {"bf16": 1.0, "fp8 tensorwise": 0.9, "fp8 blockwise": 0.8}
    assert precision.fastest(times) == "fp8 blockwise"
    assert precision.fastest({"fp32": 1.0, "bf16": 2.0}) == "fp32"


def test_a_precision_by_name_is_left_alone() -> None:
    config = dataclasses.replace(CONFIG, hardware=HardwareConfig(precision="bf16"))
    assert precision.resolve(config) is config


@without_gpu
@pytest.mark.usefixtures("one_process")
def test_a_cpu_without_bf16_products_takes_fp32_unmeasured(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "CPU_INFO", cache / "absent")
    assert precision.resolve(CONFIG).hardware.precision == "fp32"
    assert not cache.exists()


@without_gpu
@pytest.mark.usefixtures("one_process")
def test_both_are_measured_once_and_the_verdict_is_kept(cache: Path) -> None:
    chosen = precision.resolve(CONFIG).hardware.precision
    (path,) = cache.iterdir()
    document = json.loads(path.read_text())
    assert set(document["seconds"]) == {"fp32", "bf16"}
    assert all(seconds > 0 for seconds in document["seconds"].values())
    assert chosen == precision.fastest(document["seconds"])
    # The kept verdict decides, not a second measurement.
    for seconds in ({"fp32": 1.0, "bf16": 0.5}, {"fp32": 1.0, "bf16": 1.5}):
        precision.write_verdict(path, document["key"], seconds)
        expected = "bf16" if seconds["bf16"] < 1 else "fp32"
        assert precision.resolve(CONFIG).hardware.precision == expected
    assert list(cache.iterdir()) == [path]


@without_gpu
@pytest.mark.usefixtures("one_process")
def test_another_model_has_another_verdict(cache: Path) -> None:
    precision.resolve(CONFIG)
    wider = dataclasses.replace(CONFIG.model, ffn_hidden_size=64)
    precision.resolve(dataclasses.replace(CONFIG, model=wider))
    deeper = dataclasses.replace(CONFIG.model, num_layers=7)
    precision.resolve(dataclasses.replace(CONFIG, model=deeper))
    assert len(list(cache.iterdir())) == 2


@pytest.mark.usefixtures("one_process")
def test_a_run_with_graphs_has_another_verdict(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_precisions_of_a_gpu(config: RunConfig) -> list[RunConfig]:
        both = [dataclasses.replace(config.hardware, precision=each) for each in ("bf16", "fp8")]
        return [dataclasses.replace(config, hardware=hardware) for hardware in both]

    monkeypatch.setattr(precision, "_candidates", in_precisions_of_a_gpu)
    monkeypatch.setattr(precision, "layer_seconds", lambda _: 1.0)
    for cuda_graphs in (False, True):
        hardware = dataclasses.replace(CONFIG.hardware, cuda_graphs=cuda_graphs)
        precision.resolve(dataclasses.replace(CONFIG, hardware=hardware))
    assert len(list(cache.iterdir())) == 2


def test_a_verdict_on_something_else_or_a_damaged_one_is_none(tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    assert precision.read_verdict(path, {"a": 1}) is None
    precision.write_verdict(path, {"a": 1}, {"fp32": 0.5})
    assert precision.read_verdict(path, {"a": 1}) == {"fp32": 0.5}
    assert precision.read_verdict(path, {"a": 2}) is None
    path.write_text(path.read_text()[:20])
    assert precision.read_verdict(path, {"a": 1}) is None


def test_the_cache_is_in_the_home_folder_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/somewhere")
    assert precision.verdict_file({}).parent == Path("/somewhere/.cache/megatron_ettin")


def test_where_nothing_can_be_written_a_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    precision.write_verdict(tmp_path / "file" / "verdict.json", {}, {"fp32": 0.5})
    assert "the verdict is not kept" in caplog.text


def test_deterministic_algorithms_are_those_of_the_run_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "restored by the fixture")
        monkeypatch.delenv(name)
    with distributed.process_groups(HardwareConfig(deterministic=True)):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["NCCL_ALGO"] == "Ring"
    assert not torch.are_deterministic_algorithms_enabled()


def test_sums_of_a_split_matmul_are_not_rounded() -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = True
    with distributed.process_groups(HardwareConfig()):
        assert matmul.allow_bf16_reduced_precision_reduction is False
