"""A whole run: the remaining sections, and RunConfig, which checks them against each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, assert_never

from megatron_ettin.config.checks import require_positive
from megatron_ettin.config.data import DataConfig, PhaseConfig
from megatron_ettin.config.hardware import HardwareConfig, check_fp8, check_layout
from megatron_ettin.config.model import ModelConfig
from megatron_ettin.config.trouble import TroubleConfig
from megatron_ettin.objectives import Objective

OptimizerName = Literal["stable_adamw", "adamw", "muon"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update (Ettin's settings as defaults). Norms and biases are never decayed."""

    lr: float
    """Peak learning rate; lr_start and lr_end of a phase are shares of it. With muon it applies to
    all parameters."""
    weight_decay: float
    """Weight decay. With stable_adamw a step shrinks weights by weight_decay * (current lr of the
    tensor / peak lr). With adamw and muon it shrinks them by weight_decay * current lr, as torch's
    AdamW does. So adamw with weight_decay / lr decays like stable_adamw while the RMS below stays
    at most 1."""
    name: OptimizerName = "stable_adamw"
    """Algorithm. stable_adamw (the recipe's): AdamW that divides each tensor's learning rate by
    max(1, RMS of g / sqrt(v)). adamw: torch's. muon: Megatron-Core's Muon for matrices and AdamW
    for embedding, norms and biases; it needs the package emerging-optimizers and
    hardware.use_distributed_optimizer false."""
    warmup_tokens: int = 0
    """Length of the linear warm-up from zero, counted from a fresh optimizer's first token."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment."""
    epsilon: float = 1e-6
    """Constant added to the square root of the second moment."""
    clip_grad: float = 0.0
    """Largest gradient norm; 0, the recipe's value, does not clip."""

    def __post_init__(self) -> None:
        """Refuse a learning rate that is not positive."""
        require_positive("optimizer", "lr", self.lr)

    @property
    def num_moments(self) -> int:
        """Tensors that are kept beside each weight, in its shape (muon: one beside a matrix)."""
        match self.name:
            case "stable_adamw" | "adamw" | "muon":
                return 2
            case _:
                assert_never(self.name)

    @property
    def needs_whole_tensors(self) -> bool:
        """Tell whether an update cannot be computed from a rank's shard of a tensor."""
        match self.name:
            case "stable_adamw" | "adamw":
                return False
            case "muon":
                return True
            case _:
                assert_never(self.name)


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """Checkpoints that stay in run_dir: all, unless a field is given.

    The newest one and those at the end of a phase always stay.
    """

    last: int | None = None
    """Number of newest checkpoints that stay."""
    every_tokens: int | None = None
    """The first checkpoint at or after each multiple of this many consumed tokens stays."""

    def __post_init__(self) -> None:
        """Refuse numbers that are not positive."""
        for name in ("last", "every_tokens"):
            if getattr(self, name) is not None:
                require_positive("checkpoint.keep", name, getattr(self, name))

    @property
    def keeps_all(self) -> bool:
        """Tell whether nothing is ever removed."""
        return self.last is None and self.every_tokens is None


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving of checkpoints, and the checkpoint that a run starts from."""

    save_every_tokens: int | None = None
    """Save each time that this many more tokens have been consumed; the end of a phase always
    saves."""
    resume: bool = False
    """Resume from the newest checkpoint of run_dir; without one, start from the beginning."""
    amend_order: bool = False
    """Let a resumed run change the rows that are still to come, for instance by phases that were
    added, cut or re-weighted. The ledger records the change."""
    initialize_from: str | None = None
    """Checkpoint folder whose weights a new run starts from, with a fresh optimizer and order."""
    check_files: bool = True
    """Compare the SHA-256 of every file of a checkpoint with the saved digest before loading.
    False also loads checkpoints without digests, which earlier versions saved."""
    fallback: bool = True
    """Resume from the checkpoint before if the newest one is damaged or incomplete, which is then
    renamed. Needs check_files. False ends the run with an error that names the damage."""
    keep: KeepConfig = KeepConfig()
    """Checkpoints that stay in run_dir."""
    copy_to: str | None = None
    """Second place: a folder or a URL for fsspec (s3://BUCKET/RUN), of this run alone. Each
    checkpoint is copied there in the background, and a start fetches what run_dir lacks."""

    @property
    def falls_back(self) -> bool:
        """Tell whether a start looks for an earlier checkpoint if the newest one is damaged."""
        return self.resume and self.fallback and self.check_files


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Reports of a run; run_dir/metrics.jsonl is always written."""

    log_every_steps: int = 10
    """Steps between console and metrics lines."""
    wandb: bool = False
    """Log to Weights & Biases too; its environment variables choose project and mode. A resumed run
    continues its W&B run."""
    tensorboard: bool = False
    """Write event files for TensorBoard into run_dir/tensorboard too; needs the package
    tensorboard."""
    row_losses: bool = False
    """Keep the summed loss and the number of tokens of every row in run_dir/ledger, 8 bytes a row.
    `tools/order.py spikes` and `losses` read them."""
    anchor: str | None = None
    """Place to which heads of the ledger are written in the background: a folder or a URL for
    fsspec, of this run alone. Choose one where the run may add files but change none."""
    anchor_every_seconds: float = 600.0
    """Shortest time between two heads, apart from those of checkpoints and of the run's end."""

    def __post_init__(self) -> None:
        """Refuse an interval that is not positive."""
        require_positive("logging", "anchor_every_seconds", self.anchor_every_seconds)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out loss on a fixed set of rows."""

    every_tokens: int | None = None
    """Measure each time that this many more tokens have been consumed; the end of a run always
    measures."""
    num_rows: int = 64
    """Number of rows of the fixed set."""
    seq_length: int = 256
    """Row length of the fixed set in slots, the same in all phases."""


@dataclass(frozen=True, kw_only=True)
class SeedConfig:
    """Seeds of the four counter generators; twins share all of them."""

    order: int = 21
    """Seed for the sample order; the original's shuffle seed."""
    mask: int = 21
    """Seed for token masking."""
    init: int = 21
    """Seed for weight initialisation."""
    dropout: int = 21
    """Seed for the dropout of attention outputs."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    objective: Objective
    """MaskedLM (encoder), CausalLM (its decoder twin), MaskedNextToken (decoder to encoder) or
    MaskedDiffusion; ByPhase and Mixture combine them by phase or by row."""
    model: ModelConfig
    """The architecture."""
    phases: list[PhaseConfig]
    """The phases, in order. A file appends with `phases+:`; `--phases.NAME.FIELD VALUE` changes the
    phase called NAME."""
    data: DataConfig
    """Corpora and blend."""
    optimizer: OptimizerConfig
    """Optimizer."""
    run_dir: str
    """Folder of checkpoints, metrics, order.json and config.yaml."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """Parallel layout, precision, micro-batches."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving, resuming, initialising."""
    logging: LoggingConfig = LoggingConfig()
    """Reports."""
    validation: ValidationConfig = ValidationConfig()
    """Held-out loss."""
    trouble: TroubleConfig = field(default_factory=TroubleConfig)
    """Answers to losses that are not finite, to spikes of the loss, and to ranks that hang."""
    seeds: SeedConfig = SeedConfig()
    """Seeds of the sample order, masks, initial weights and dropout."""
    profile: bool = False
    """Trace steps six to eight on the main rank. The trace goes to run_dir/profile.json; the log
    names the longest kernels or operations."""

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
        if self.optimizer.needs_whole_tensors and self.hardware.use_distributed_optimizer:
            raise ValueError(
                f"optimizer.name: {self.optimizer.name} needs whole tensors; give "
                f"--hardware.use_distributed_optimizer false"
            )

    def _check_precision(self) -> None:
        uses = self.model.uses_transformer_engine
        if uses is True and self.hardware.parameter_precision == "fp32":
            raise ValueError(
                "model.backend: transformer_engine rounds the factors of fp32 matmuls to TF32; "
                "give hardware.precision bf16 or fp8, or the backend local"
            )
        if self.hardware.is_fp8:
            if uses is False:
                raise ValueError(
                    "hardware.precision: fp8 needs Transformer Engine, but model.backend is local"
                )
            lengths = [phase.seq_length for phase in self.phases]
            if self.data.validation:
                lengths.append(self.validation.seq_length)
            for length in lengths:
                check_fp8(self.model, self.hardware, length)
