"""Every setting of a run: typed sections, YAML by axis, command-line overrides.

Nothing here imports torch or megatron, so `--help` and the error for a typo come at once.
"""

from megatron_ettin.config.command_line import (
    ConfigError,
    load_config,
    parse_args,
    to_yaml,
)
from megatron_ettin.config.data import (
    FIRST_ROTARY_BASES,
    DataConfig,
    Decay,
    PhaseConfig,
    RotaryBases,
    SourceConfig,
    with_rotary_bases,
)
from megatron_ettin.config.hardware import Fp8Recipe, HardwareConfig, check_fp8, check_layout
from megatron_ettin.config.model import ModelConfig
from megatron_ettin.config.run import (
    CheckpointConfig,
    KeepConfig,
    LoggingConfig,
    OptimizerConfig,
    OptimizerName,
    RunConfig,
    SeedConfig,
    ValidationConfig,
)
from megatron_ettin.config.trouble import TroubleConfig

__all__ = [
    "FIRST_ROTARY_BASES",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "Decay",
    "Fp8Recipe",
    "HardwareConfig",
    "KeepConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OptimizerName",
    "PhaseConfig",
    "RotaryBases",
    "RunConfig",
    "SeedConfig",
    "SourceConfig",
    "TroubleConfig",
    "ValidationConfig",
    "check_fp8",
    "check_layout",
    "load_config",
    "parse_args",
    "to_yaml",
    "with_rotary_bases",
]
