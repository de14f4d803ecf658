"""A whole run: the remaining sections, and RunConfig with what must hold between sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_ettin.config.checks import positive
from megatron_ettin.config.data import DataConfig, PhaseConfig
from megatron_ettin.config.hardware import HardwareConfig, check_fp8, check_layout
from megatron_ettin.config.model import ModelConfig
from megatron_ettin.objectives import Objective


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update (Ettin's settings as defaults). Norms and biases are never decayed."""

    lr: float
    """Peak learning rate; phases give shares of it. With muon, of all parameters."""
    weight_decay: float
    """stable_adamw: fully decoupled, a step shrinks weights by weight_decay * (current lr of the
    tensor / peak lr). adamw, muon: as torch's AdamW, by weight_decay * current lr; so adamw with
    weight_decay / lr decays like stable_adamw where nothing is damped."""
    name: Literal["stable_adamw", "adamw", "muon"] = "stable_adamw"
    """stable_adamw: AdamW with each tensor's update damped by its RMS, the recipe's. adamw:
    torch's. muon: Megatron-Core's Muon for matrices and AdamW for embedding, norms and biases; it
    needs the package emerging-optimizers and hardware.use_distributed_optimizer false."""
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
        positive("optimizer", "lr", self.lr)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept and where a run starts from."""

    save_every_tokens: int | None = None
    """Save whenever this many tokens have been consumed, and at the end of every phase."""
    resume: bool = False
    """Go on from the newest checkpoint of run_dir (from the start if there is none)."""
    amend_order: bool = False
    """Accept, on resuming, that rows which have not been trained on yet are other ones than the
    checkpoint's run had planned (phases added, cut, re-weighted); the ledger records it."""
    initialize_from: str | None = None
    """Checkpoint folder to take the weights from, with a fresh optimizer and order."""
    check_files: bool = True
    """Compare the SHA-256 of every file of a checkpoint with what was saved before it is loaded.
    False also loads checkpoints without digests, which earlier versions saved."""


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
    """MaskedLM (an encoder), CausalLM (its twin) or MaskedNextToken (from decoder to encoder)."""
    model: ModelConfig
    """The architecture."""
    phases: list[PhaseConfig]
    """The phases, in order. A file appends with `phases+:`; `--phases.NAME.FIELD VALUE` changes one
    phase, by its name."""
    data: DataConfig
    """Corpora and blend."""
    optimizer: OptimizerConfig
    """The update and its settings."""
    run_dir: str
    """Folder of checkpoints, metrics, order.json and config.yaml."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """Parallel layout."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving, resuming, initialising."""
    logging: LoggingConfig = LoggingConfig()
    """Reports."""
    validation: ValidationConfig = ValidationConfig()
    """Held-out loss."""
    seeds: SeedConfig = SeedConfig()
    """Counter seeds."""
    profile: bool = False
    """Trace three steps after the first five: run_dir/profile.json, and what took longest in the
    log; of the main rank."""

    def __post_init__(self) -> None:
        """Refuse sections that contradict each other."""
        if not self.phases:
            raise ValueError("phases: none given; add a file of examples/phase with --config")
        check_layout(self.model, self.hardware)
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phases: names must differ, got {names}")
        for phase in self.phases:
            if phase.name not in self.data.blend:
                raise ValueError(
                    f"data.blend: no entry for phase {phase.name!r}; "
                    f"it has {sorted(self.data.blend)}"
                )
            self.hardware.micro_batch_rows(phase.seq_length)
        if self.data.validation:
            self.hardware.micro_batch_rows(self.validation.seq_length)
        self._check_precision()
        if self.optimizer.name == "muon" and self.hardware.use_distributed_optimizer:
            raise ValueError(
                "optimizer.name: muon needs whole tensors; give "
                "--hardware.use_distributed_optimizer false"
            )

    def _check_precision(self) -> None:
        backend, precision = self.model.backend, self.hardware.precision
        if backend == "transformer_engine" and precision == "fp32":
            raise ValueError(
                "model.backend: transformer_engine rounds the factors of fp32 products to TF32; "
                "give hardware.precision bf16 or fp8, or the backend local"
            )
        if precision == "fp8":
            if backend == "local":
                raise ValueError(
                    "hardware.precision: fp8 needs Transformer Engine, but model.backend is local"
                )
            lengths = [phase.seq_length for phase in self.phases]
            if self.data.validation:
                lengths.append(self.validation.seq_length)
            for length in lengths:
                check_fp8(self.model, self.hardware, length)
