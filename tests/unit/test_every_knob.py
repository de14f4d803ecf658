"""Every field of the configuration is known to `tools/estimate.py`, and says what it is.

A new field needs a line below: a value that changes an estimate, or a place among those that change
none. docs/estimate.md, section "Limits", says which should and do not.
"""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin import config as configuration
from megatron_ettin.config import (
    CheckpointConfig,
    DataConfig,
    HardwareConfig,
    KeepConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    RunConfig,
)
from megatron_ettin.devices import GPUS
from megatron_ettin.estimate.command_line import EstimateConfig
from megatron_ettin.estimate.plan import estimate
from megatron_ettin.objectives import CausalLM, Objective

ROOT = Path(__file__).parents[2]
#: Fields that an estimate depends on, each with a value that changes it.
CHANGES: dict[str, Any] = {
    "model.num_layers": 6,
    "model.hidden_size": 512,
    "model.ffn_hidden_size": 512,
    "model.num_attention_heads": 2,
    "model.vocab_size": 1000,
    "model.sliding_window": 32,
    "model.global_attention_every": 4,
    "phases.train_tokens": 10**10,
    "phases.seq_length": 2048,
    "phases.global_batch_size": 64,
    "phases.train_rows": 1000,
    "phases.batch_ramp_start": 32,
    "phases.batch_ramp_tokens": 2 * 10**9,
    "hardware.tensor_parallel_size": 4,
    "hardware.pipeline_parallel_size": 4,
    "hardware.context_parallel_size": 4,
    "hardware.sequence_parallel": True,
    "hardware.recompute": "full",
    "hardware.micro_batch_tokens": 4096,
    "hardware.precision": "fp32",
    "hardware.use_distributed_optimizer": False,
    "checkpoint.save_every_tokens": 10**8,
    "checkpoint.keep.last": 1,
    "checkpoint.keep.every_tokens": 10**9,
}
#: Fields that change neither memory, time, steps nor disk.
CHANGES_NOTHING = {
    *("model.layernorm_epsilon", "model.init_std"),
    *(f"phases.{name}" for name in ("name", "lr_start", "lr_end", "lr_decay", "lr_decay_tokens")),
    *("phases.rotary_base_global", "phases.rotary_base_local", "phases.allow_repeats"),
    *(f"optimizer.{name}" for name in ("lr", "weight_decay", "warmup_tokens", "clip_grad")),
    *("optimizer.beta1", "optimizer.beta2", "optimizer.epsilon"),
    *(f"checkpoint.{name}" for name in ("resume", "amend_order", "initialize_from", "check_files")),
    *("checkpoint.fallback", "checkpoint.copy_to"),
    *(f"trouble.{name}" for name in ("spike_z", "window_steps", "rewind_steps", "hang_seconds")),
    "trouble.max_interventions",
    *("logging.log_every_steps", "logging.wandb", "logging.tensorboard"),
    *("logging.anchor", "logging.anchor_every_seconds"),
    *("seeds.order", "seeds.mask", "seeds.init", "seeds.dropout"),
    *("run_dir", "profile"),
}
#: Fields that an estimate leaves out, each with a reason; docs/estimate.md has most of them.
LEFT_OUT = {
    "trouble.on_nan": "rows that a run will leave out are not known before",
    "trouble.on_spike": "as with trouble.on_nan; the look at each step is not measured",
    "model.backend": "local and Transformer Engine are estimated alike",
    "model.attention_output_dropout": "factors are kept on a CPU only",
    "model.megatron_overrides": "`model.megatron_overrides`",
    "phases.pack": "`--fill`",
    "phases.max_segments_per_row": "`--fill`",
    "optimizer.name": "Muon is counted like AdamW",
    "hardware.fp8_recipe": "estimated as bf16",
    "hardware.deterministic": "not measured",
    "hardware.cuda_graphs": "`hardware.cuda_graphs`",
    "logging.row_losses": "`logging.row_losses`",
    "hardware.threads_per_rank": "counts on a CPU only",
    "validation": "Validation",
    "data": "Corpora are mapped into memory",
}
#: Values, before the change, of the fields that go with one.
BEFORE: dict[str, dict[str, Any]] = {
    "phases.batch_ramp_start": {"batch_ramp_start": 128, "batch_ramp_tokens": 10**9},
    "phases.batch_ramp_tokens": {"batch_ramp_start": 128, "batch_ramp_tokens": 10**9},
    "hardware.sequence_parallel": {"tensor_parallel_size": 4},
    "checkpoint.keep.last": {"save_every_tokens": 10**8},
    "checkpoint.keep.every_tokens": {"save_every_tokens": 10**8, "keep": KeepConfig(last=2)},
}


def fields(section: Any = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield the name of each field of a run, but for those of objectives, validation and data."""
    for name, hint in typing.get_type_hints(section).items():
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
        if inner is Objective:
            continue
        if dataclasses.is_dataclass(inner) and prefix + name not in LEFT_OUT:
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


FIELDS = list(fields())


def run(**changes: dict[str, Any]) -> RunConfig:
    """Return a run of one phase; `changes` by section."""
    shape = {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 384, "num_attention_heads": 4}
    phase = {
        "name": "one",
        "train_tokens": 4 * 10**9,
        "seq_length": 1024,
        "global_batch_size": 256,
        "rotary_base_global": 10_000.0,
        "rotary_base_local": 10_000.0,
    }
    hardware = {"micro_batch_tokens": 16384, "precision": "bf16"}
    optimizer = {"lr": 1.0, "weight_decay": 0.0}
    return RunConfig(
        objective=CausalLM(),
        model=ModelConfig(**shape | changes.get("model", {})),  # type: ignore[arg-type]
        phases=[PhaseConfig(**phase | changes.get("phases", {}))],  # type: ignore[arg-type]
        hardware=HardwareConfig(**hardware | changes.get("hardware", {})),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(**changes.get("checkpoint", {})),
        optimizer=OptimizerConfig(**optimizer | changes.get("optimizer", {})),
        data=DataConfig(tokenizer="", sources={}, blend={"one": {}}),
        run_dir="",
    )


def numbers(config: RunConfig) -> dict[str, Any]:
    """Return all that an estimate says of a run on eight GPUs, but for the layout it repeats."""
    found = dataclasses.asdict(estimate(config, GPUS["h100"], num_devices=8, fill=1.0))
    return {name: value for name, value in found.items() if name != "hardware"}


def test_every_field_is_known_to_the_estimate() -> None:
    known = [*CHANGES, *CHANGES_NOTHING, *LEFT_OUT]
    assert len(set(known)) == len(known)
    advice = "say in estimate/ what it costs, and here which value shows it"
    assert set(FIELDS) ^ set(known) == set(), advice


@pytest.mark.parametrize("field", CHANGES)
def test_the_estimate_follows_a_field(field: str) -> None:
    section, *names = field.split(".")
    before = BEFORE.get(field, {})
    base = run(**{section: before})
    value = CHANGES[field]
    if len(names) > 1:
        inner = getattr(getattr(base, section), names[0])
        value = dataclasses.replace(inner, **{names[1]: value})
    changed = run(**{section: {**before, names[0]: value}})
    assert numbers(changed) != numbers(base)


def test_the_estimate_reads_every_section_of_a_run() -> None:
    """So that a run's own config.yaml can be given to tools/estimate.py as it is."""
    assert {f.name for f in dataclasses.fields(RunConfig)} <= set(
        EstimateConfig.__dataclass_fields__
    )


@pytest.mark.parametrize(
    "section",
    [value for value in vars(configuration).values() if dataclasses.is_dataclass(value)],
    ids=lambda section: section.__name__,
)
def test_every_field_says_what_it_is(section: type) -> None:
    """`--help` prints the string below a field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    for statement, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert is_text, f"{ast.unparse(statement.target)} has no docstring"
