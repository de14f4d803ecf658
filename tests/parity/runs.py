"""A finished run's checkpoint without the run: the untrained weights of a small model."""

from pathlib import Path
from typing import Any

import torch

from megatron_ettin import checkpoint, distributed
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import (
    DataConfig,
    HardwareConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    RunConfig,
    SeedConfig,
    SourceConfig,
)
from megatron_ettin.model.provider import build_model, logical_parameters
from megatron_ettin.objectives import CausalLM, MaskedLM

OBJECTIVES = {"encoder": MaskedLM(), "decoder": CausalLM()}


def make_run(kind: str, tokenizer: Path, **model: Any) -> RunConfig:
    """Describe a run of two phases that differ in row length and RoPE bases."""
    shape = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 2}
    phases = [
        PhaseConfig(
            name="pretrain",
            train_tokens=9,
            seq_length=128,
            global_batch_size=4,
            rotary_base_global=10_000.0,
            rotary_base_local=10_000.0,
        ),
        PhaseConfig(
            name="extension",
            train_tokens=9,
            seq_length=512,
            global_batch_size=4,
            rotary_base_global=160_000.0,
            rotary_base_local=20_000.0,
        ),
    ]
    return RunConfig(
        objective=OBJECTIVES[kind],
        model=ModelConfig(**{**shape, "vocab_size": 1024, **model}),
        phases=phases,
        data=DataConfig(
            tokenizer=str(tokenizer),
            sources={"text": SourceConfig(prefix="text_document")},
            blend={phase.name: {"text": 1.0} for phase in phases},
        ),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0),
        run_dir="run",
    )


def save_run(
    folder: Path, config: RunConfig, phase: str, sha256: str, precision: str = "fp32"
) -> dict[str, torch.Tensor]:
    """Write the run's checkpoint and return its parameters by their names here."""
    hardware = HardwareConfig(precision=precision)  # type: ignore[arg-type]
    attention = checkpoint.SavedModel.of_run(config, RunState(phase=phase)).attention
    with distributed.process_groups(hardware):
        stage = build_model(config.model, attention, hardware, SeedConfig(init=3))
        state = RunState(g=4, step=1, phase=phase, tokenizer_sha256=sha256)
        files = checkpoint.write(folder, stage, None, config=config, state=state)
        checkpoint.publish(folder, files, state)
        return {name: p.detach().clone() for name, p in logical_parameters(stage)}


def load_parameters(folder: Path) -> dict[str, torch.Tensor]:
    """Return the parameters of a checkpoint by their names here."""
    saved, hardware = checkpoint.read_model(folder), HardwareConfig()
    with distributed.process_groups(hardware):
        stage = build_model(saved.model, saved.attention, hardware, SeedConfig())
        checkpoint.load(folder, stage, None, saved.model)
        return {name: p.detach().clone() for name, p in logical_parameters(stage)}
