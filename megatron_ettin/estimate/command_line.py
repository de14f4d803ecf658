"""The run and the device that a command line of tools/estimate.py describes."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import jsonargparse

from megatron_ettin.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    HardwareConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    RunConfig,
    SeedConfig,
    TroubleConfig,
    ValidationConfig,
)
from megatron_ettin.config.combine import with_phases_by_name
from megatron_ettin.config.command_line import RunParser, parser_of, with_nearest_value
from megatron_ettin.devices import DEVICES
from megatron_ettin.estimate.throughput import PUBLISHED_PHASES
from megatron_ettin.objectives import Objective

#: The published cadence: 236 checkpoints of 2 T tokens.
PUBLISHED_SAVE_EVERY_TOKENS = 8_500_000_000
#: Best-fit packing filled 99.995 % of the slots of four million documents (docs/performance.md).
USUAL_FILL = 0.9999


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """The sections of a run, of which only two are needed."""

    objective: Objective
    """MaskedLM (an encoder), CausalLM (its decoder twin) or another."""
    model: ModelConfig
    """The architecture."""
    phases: list[PhaseConfig] | None = None
    """The phases; Ettin's three, of 2 T tokens together, if not given."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """Parallel layout; if nothing of it is given: bf16 on a GPU, fp32 on a CPU, and the largest
    micro-batch up to 65,536 slots that leaves a tenth of the memory free."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving; every 8.5 B tokens, as the published runs, if neither this nor phases are given."""
    optimizer: OptimizerConfig | None = None
    """Not needed for its settings; its name says how many moments a weight has."""
    data: DataConfig | None = None
    """Not needed; read so that a run's files can be given as they are."""
    trouble: TroubleConfig = field(default_factory=TroubleConfig)
    """Not needed, like data."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Not needed, like data."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Not needed, like data."""
    seeds: SeedConfig = field(default_factory=SeedConfig)
    """Not needed, like data."""
    run_dir: str | None = None
    """Not needed, like data."""
    profile: bool = False
    """Not needed, like data."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """Question of a command line: a run, a device, and what is known of its rate."""

    config: RunConfig
    choose_micro_batch: bool
    device: str
    num_devices: int
    device_memory_gib: float | None
    tokens_per_s: float | None
    fill: float
    as_json: bool


def parse(arguments: Sequence[str] | None = None) -> Question:
    """Return what the command line asks (`--help` exits).

    Raises:
        ConfigError: naming the field that is unknown, of the wrong type, or contradicts another.
    """
    parser = _parser()
    try:
        given = sys.argv[1:] if arguments is None else arguments
        arguments = with_phases_by_name(parser, given)
        options = vars(parser.instantiate(parser.parse_args(arguments)))
        for name in ("num_devices", "tokens", "device_memory_gib", "tokens_per_s"):
            if options[name] is not None and not options[name] > 0:
                raise ValueError(f"--{name}: {options[name]} is not positive")
        if not 0.0 < options["fill"] <= 1.0:
            raise ValueError(f"--fill: {options['fill']} is no share in (0, 1]")
        options.pop("config")
        # A value that is given counts, also where it equals the default.
        return _question(options, set(vars(parser.parse_args(arguments, defaults=False))))
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise ConfigError(with_nearest_value(str(error))) from error


def _parser() -> RunParser:
    parser = parser_of(
        EstimateConfig,
        prog="tools/estimate.py",
        usage="%(prog)s --config FILE [--config FILE ...] [--OPTION VALUE ...]",
        description="Estimate parameters, memory, time, steps and disk of a run before it starts.",
    )
    add = parser.add_argument
    add(
        "--device", choices=DEVICES, default="h100", help="device of each rank; cpu is this machine"
    )
    add("--num_devices", type=int, default=1, help="ranks; on a CPU, processes")
    add(
        "--device_memory_gib",
        type=float,
        help="memory of a device, in place of the one in the table",
    )
    add("--tokens", type=float, help="budget in tokens; the phases keep their shares of it")
    add(
        "--tokens_per_s",
        type=float,
        help="measured rate of all devices together; default: estimated",
    )
    add("--fill", type=float, default=USUAL_FILL, help="share of the slots that hold tokens")
    add("--json", dest="as_json", action="store_true", help="end with one JSON object")
    parser.add_class_arguments(EstimateConfig)
    return parser


def _question(options: dict[str, Any], given: Collection[str]) -> Question:
    """Fill in what is not `given`: names of sections and options."""
    sections = {name: options[name] for name in EstimateConfig.__dataclass_fields__}
    phases = sections["phases"]
    if phases is None:
        phases = list(PUBLISHED_PHASES)
        if "checkpoint" not in given:
            sections["checkpoint"] = CheckpointConfig(save_every_tokens=PUBLISHED_SAVE_EVERY_TOKENS)
    if options["tokens"] is not None:
        factor = options["tokens"] / sum(phase.train_tokens for phase in phases)
        phases = [phase.scaled(factor) for phase in phases]
    on_gpu = options["device"] != "cpu"
    choose = "hardware" not in given
    if choose:
        longest = max(phase.seq_length for phase in phases)
        sections["hardware"] = HardwareConfig(
            precision="bf16" if on_gpu else "fp32", micro_batch_tokens=longest
        )
    sections |= {
        "phases": phases,
        "run_dir": sections["run_dir"] or "",
        # What a run needs and an estimate does not.
        "optimizer": sections["optimizer"] or OptimizerConfig(lr=1.0, weight_decay=0.0),
        "data": DataConfig(tokenizer="", sources={}, blend={phase.name: {} for phase in phases}),
    }
    names = ("device", "num_devices", "device_memory_gib", "tokens_per_s", "fill", "as_json")
    return Question(
        config=RunConfig(**sections),
        choose_micro_batch=choose,
        **{name: options[name] for name in names},
    )
