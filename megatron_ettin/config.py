"""Every knob of a run, in one place: typed sections, YAML by axis, command-line overrides.

Neither torch nor megatron is imported here, so that `--help` and a typo answer at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse

from megatron_ettin.objectives import Objective, Specials

#: The vocabulary is padded once to a multiple of this, whatever the parallel layout (contracts).
VOCAB_MULTIPLE = 64


def _positive(section: str, name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{section}.{name}: {value} is not positive")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture that an encoder and its decoder twin share (Ettin paper Table 1)."""

    num_layers: int
    """Number of transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of one half of the gated MLP."""
    num_attention_heads: int
    """Heads of width hidden_size / num_attention_heads; no grouped queries."""
    vocab_size: int = 50368
    """Rows of the embedding that are real tokens or published padding."""
    sliding_window: int = 64
    """Keys that a local layer sees on each side (bidirectional) or to the left (causal)."""
    global_attention_every: int = 3
    """Layers 0, n, 2n, ... attend to the whole document; the others are local."""
    layernorm_epsilon: float = 1e-5
    """Of the bias-free LayerNorms (the released code's value; the paper's table has 1e-12)."""
    init_std: float = 0.02
    """Standard deviation of the input-side weights (full_megatron)."""
    attention_output_dropout: float = 0.1
    """Dropout of the attention output while training (the released recipe's; nowhere else)."""
    megatron_overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of Megatron-Core's TransformerConfig to set as they are: the one escape hatch."""

    def __post_init__(self) -> None:
        """Refuse shapes that do not exist."""
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
            _positive("model", name, getattr(self, name))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size: {self.hidden_size} is not divisible by "
                f"model.num_attention_heads: {self.num_attention_heads}"
            )
        _positive("model", "sliding_window", self.sliding_window)
        _positive("model", "global_attention_every", self.global_attention_every)
        if not 0.0 <= self.attention_output_dropout < 1.0:
            raise ValueError(
                f"model.attention_output_dropout: {self.attention_output_dropout} is not in [0, 1)"
            )

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix: vocab_size padded to a multiple of 64."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def is_global(self, layer: int) -> bool:
        """Tell whether `layer` (counted from 0) attends to whole documents."""
        return layer % self.global_attention_every == 0


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One phase of training: tokens, row length, learning rates, RoPE bases."""

    name: str
    """Name by which `data.blend`, `data.pools` and `mask_rate_by_phase` refer to the phase."""
    train_tokens: int
    """Tokens to train on: special tokens counted, padding not."""
    seq_length: int
    """Slots of a row (L)."""
    global_batch_size: int
    """Rows of an optimizer step."""
    max_segments_per_row: int | None = None
    """Pieces a row may hold; seq_length / 16 if not given."""
    lr_start: float = 1.0
    """Learning rate at the start of the phase, as a share of `optimizer.lr`."""
    lr_end: float = 1.0
    """Learning rate at the end of the phase, as a share of `optimizer.lr`."""
    lr_decay: Literal["linear", "one_minus_sqrt"] = "one_minus_sqrt"
    """Curve from lr_start to lr_end."""
    lr_decay_tokens: int | None = None
    """Length of that curve, at the end of the phase; the whole phase if not given."""
    rotary_base_global: float = 10_000.0
    """RoPE base of the global layers."""
    rotary_base_local: float = 10_000.0
    """RoPE base of the local layers."""
    allow_repeats: bool = False
    """Let the phase draw documents that a phase with another row length has drawn too."""

    def __post_init__(self) -> None:
        """Refuse phases that cannot be run."""
        for name in ("train_tokens", "seq_length", "global_batch_size"):
            _positive(f"phase {self.name!r}", name, getattr(self, name))
        if self.segments_per_row < 1:
            raise ValueError(f"phase {self.name!r}: max_segments_per_row must be at least 1")
        if self.lr_decay_tokens is not None and not 0 < self.lr_decay_tokens <= self.train_tokens:
            raise ValueError(
                f"phase {self.name!r}: lr_decay_tokens {self.lr_decay_tokens} is not between 1 and "
                f"train_tokens {self.train_tokens}"
            )

    @property
    def segments_per_row(self) -> int:
        """Pieces a row may hold (default seq_length / 16, at least 1)."""
        if self.max_segments_per_row is not None:
            return self.max_segments_per_row
        return max(1, self.seq_length // 16)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One tokenised corpus."""

    prefix: str
    """Path of the `.bin` and `.idx` without the suffix."""
    specials: Specials = "add"
    """Whether [CLS] and [SEP] are added to each piece or are in the files already."""
    min_doc_tokens: int = 1
    """Shorter documents are dropped, and counted."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpora, their blend by phase, and the tokenizer they were made with."""

    tokenizer: str
    """Tokenizer folder (tokenizer.json)."""
    sources: dict[str, SourceConfig]
    """Training corpora by name."""
    blend: dict[str, dict[str, float]]
    """For each phase, the share of rows that each source gives."""
    pools: dict[str, tuple[float, float]] = field(default_factory=dict)
    """For each phase, the share [from, to) of every source's documents it may draw; default all."""
    validation: list[str] = field(default_factory=list)
    """Prefixes of held-out corpora, drawn from equally."""

    def __post_init__(self) -> None:
        """Refuse blends of unknown sources and pools that are not shares."""
        for phase, blend in self.blend.items():
            for name in blend:
                if name not in self.sources:
                    raise ValueError(
                        f"data.blend.{phase}: unknown source {name!r}; "
                        f"data.sources has {sorted(self.sources)}"
                    )
        for phase, (low, high) in self.pools.items():
            if not 0.0 <= low < high <= 1.0:
                raise ValueError(f"data.pools.{phase}: [{low}, {high}) is no range within [0, 1]")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """StableAdamW with decoupled weight decay (Ettin's settings as defaults)."""

    lr: float
    """Peak learning rate; phases give shares of it."""
    weight_decay: float
    """Fully decoupled: a step shrinks weights by weight_decay * (current lr / peak lr)."""
    warmup_tokens: int = 0
    """Linear warm-up from zero, from the first token a fresh optimizer sees."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment."""
    epsilon: float = 1e-6
    """Added to the root of the second moment."""
    clip_grad: float = 0.0
    """Gradient-norm clipping; 0 (no clipping) in the recipe."""

    def __post_init__(self) -> None:
        """Refuse a learning rate that trains nothing."""
        _positive("optimizer", "lr", self.lr)


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """How the work is laid out over the machine; never changes what is computed."""

    tensor_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_parallel_size: int = 1
    """Ranks that share the layers; the rest of the world is data-parallel."""
    micro_batch_tokens: int = 8192
    """Slots of a micro-batch; a multiple of every phase's seq_length."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward and backward pass; the optimizer always keeps fp32 weights."""
    threads_per_rank: int | None = None
    """CPU threads of a rank; torch's own choice if not given."""

    def __post_init__(self) -> None:
        """Refuse sizes below one."""
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "micro_batch_tokens"):
            _positive("hardware", name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept and where a run starts from."""

    save_every_tokens: int | None = None
    """Save whenever this many tokens have been consumed, and at the end of every phase."""
    resume: bool = False
    """Go on from the newest checkpoint of run_dir (from the start if there is none)."""
    initialize_from: str | None = None
    """Checkpoint folder to take the weights from, with a fresh optimizer and order."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run reports; run_dir/metrics.jsonl is always written."""

    log_every_steps: int = 10
    """Steps between console and metrics lines."""
    wandb: bool = False
    """Also log to Weights & Biases (its own environment variables choose project and mode)."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out loss on a fixed set of rows."""

    every_tokens: int | None = None
    """Measure whenever this many tokens have been consumed; always at the end of a run."""
    num_rows: int = 64
    """Rows of the fixed set."""
    seq_length: int = 256
    """Slots of those rows, the same in all phases."""


@dataclass(frozen=True, kw_only=True)
class SeedConfig:
    """Seeds of the four counters; twins share all of them."""

    order: int = 21
    """Of the sample order (the original's shuffle seed)."""
    mask: int = 21
    """Of the masks."""
    init: int = 21
    """Of the initial weights."""
    dropout: int = 21
    """Of the attention-output dropout."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    objective: Objective
    """MaskedLM (an encoder) or CausalLM (its decoder twin)."""
    model: ModelConfig
    """The architecture."""
    phases: list[PhaseConfig]
    """The phases, in order; a file appends with `phases+:`."""
    data: DataConfig
    """Corpora and blend."""
    optimizer: OptimizerConfig
    """StableAdamW."""
    run_dir: str
    """Folder of checkpoints, metrics, order.json and config.yaml."""
    hardware: HardwareConfig = HardwareConfig()
    """Parallel layout."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving, resuming, initialising."""
    logging: LoggingConfig = LoggingConfig()
    """Reports."""
    validation: ValidationConfig = ValidationConfig()
    """Held-out loss."""
    seeds: SeedConfig = SeedConfig()
    """Counter seeds."""

    def __post_init__(self) -> None:
        """Refuse sections that contradict each other."""
        if not self.phases:
            raise ValueError("phases: none given; add a file of examples/phase with --config")
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phases: names must differ, got {names}")
        for phase in self.phases:
            if phase.name not in self.data.blend:
                raise ValueError(
                    f"data.blend: no entry for phase {phase.name!r}; "
                    f"it has {sorted(self.data.blend)}"
                )
            if self.hardware.micro_batch_tokens % phase.seq_length:
                raise ValueError(
                    f"hardware.micro_batch_tokens: {self.hardware.micro_batch_tokens} is not a "
                    f"multiple of seq_length {phase.seq_length} of phase {phase.name!r}"
                )
        for kind, size in (
            ("model.num_attention_heads", self.model.num_attention_heads),
            ("model.ffn_hidden_size", self.model.ffn_hidden_size),
            ("padded vocabulary", self.model.padded_vocab_size),
        ):
            if size % self.hardware.tensor_parallel_size:
                raise ValueError(
                    f"hardware.tensor_parallel_size: {self.hardware.tensor_parallel_size} does not "
                    f"divide {kind}: {size}"
                )
        if self.hardware.pipeline_parallel_size > self.model.num_layers:
            raise ValueError(
                f"hardware.pipeline_parallel_size: {self.hardware.pipeline_parallel_size} exceeds "
                f"model.num_layers: {self.model.num_layers}"
            )


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the field, and the file if there is one."""


def parse_args(argv: Sequence[str] | None = None) -> RunConfig:
    """Return the run that the command line describes (`--help` exits).

    Raises:
        ConfigError: naming the field that is unknown, of the wrong type, or contradicts another.
    """
    parser = _parser()
    try:
        return _instantiate(parser, parser.parse_args(argv))
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise ConfigError(str(error)) from error


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back identically."""
    parser = _parser()
    values = dataclasses.asdict(config)
    values["objective"] = {
        "class_path": f"{type(config.objective).__module__}.{type(config.objective).__qualname__}",
        "init_args": dataclasses.asdict(config.objective),
    }
    return str(parser.dump(parser.parse_object(values)))


def load_config(path: Path) -> RunConfig:
    """Read a configuration that `to_yaml` wrote.

    Raises:
        ConfigError: naming the file and the field.
    """
    parser = _parser()
    try:
        return _instantiate(parser, parser.parse_path(str(path)))
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _parser() -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(
        subclasses_enabled=[Objective], docstring_parse_attribute_docstrings=True
    )
    parser = jsonargparse.ArgumentParser(
        prog="python -m megatron_ettin.pretrain",
        description="Pre-train an Ettin encoder or decoder.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; repeat, later ones win.")
    parser.add_class_arguments(RunConfig)
    return parser


def _instantiate(parser: jsonargparse.ArgumentParser, parsed: jsonargparse.Namespace) -> RunConfig:
    sections = vars(parser.instantiate(parsed))
    sections.pop("config")
    return RunConfig(**sections)
