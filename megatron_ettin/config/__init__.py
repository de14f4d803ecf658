"""Every setting of a run: typed sections, YAML by axis, command-line overrides.

Nothing here imports torch or megatron, so `--help` and the error for a typo come at once.
"""

from megatron_ettin.config.command_line import ConfigError, load_config, parse_args, to_yaml
from megatron_ettin.config.data import (
    FIRST_ROTARY_BASES,
    DataConfig,
    PhaseConfig,
    RotaryBases,
    SourceConfig,
    with_rotary_bases,
)
from megatron_ettin.config.hardware import HardwareConfig, check_fp8, check_layout
from megatron_ettin.config.model import ModelConfig
from megatron_ettin.config.run import (
    CheckpointConfig,
    KeepConfig,
    LoggingConfig,
    OptimizerConfig,
    RunConfig,
    SeedConfig,
    ValidationConfig,
)

__all__ = [
    "FIRST_ROTARY_BASES",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "HardwareConfig",
    "KeepConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "RotaryBases",
    "RunConfig",
    "SeedConfig",
    "SourceConfig",
    "ValidationConfig",
    "check_fp8",
    "check_layout",
    "load_config",
    "parse_args",
    "to_yaml",
    "with_rotary_bases",
]
