"""The `hardware` section: how the work is laid out over the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

from megatron_ettin.config.checks import require_positive
from megatron_ettin.config.model import ModelConfig

Fp8Recipe = Literal["delayed", "tensorwise", "blockwise"]

#: Transformer Engine's fp8 matmuls take sizes that are multiples of this.
FP8_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """Layout of the work over the machine; it never changes the result, but for rounding."""

    tensor_parallel_size: int = 1
    """Ranks over which each layer is sharded."""
    pipeline_parallel_size: int = 1
    """Ranks over which the layers are divided. All ranks beyond one replica are data-parallel."""
    context_parallel_size: int = 1
    """Ranks that share the slots of a micro-batch; inside the attention they share its heads."""
    sequence_parallel: bool = False
    """Let tensor-parallel ranks share the slots between the layers' matmuls."""
    recompute: Literal["none", "full"] = "none"
    """Activations that the backward pass computes again. none: keep all. full: keep each layer's
    input only, for less memory and a third more work."""
    micro_batch_tokens: int = 8192
    """Upper bound of a micro-batch's slots; it takes as many whole rows as fit."""
    precision: Literal["fp32", "bf16", "fp8", "auto"] = "fp32"
    """Precision of the forward and backward pass; the optimizer always keeps fp32 weights. fp8:
    Transformer Engine runs the layers' linears in fp8; weights and all else are bf16. auto: the
    fastest by a short measurement on this machine, whose result is kept (docs/gpu.md)."""
    fp8_recipe: Fp8Recipe = "tensorwise"
    """Scaling of fp8 tensors. tensorwise: by the maximum of the tensor. blockwise: by that of each
    block. delayed: by the maxima of past steps; no checkpoint holds these, so a resumed run starts
    without them."""
    deterministic: bool = False
    """Use only GPU algorithms that repeat a run bit by bit (slower). A CPU repeats it anyway."""
    cuda_graphs: bool = False
    """Launch the forward and backward pass of a micro-batch as one CUDA graph, so that a small
    model does not wait for its kernel launches. Every rank must hold the whole model."""
    use_distributed_optimizer: bool = True
    """Shard fp32 weights and moments over the data-parallel ranks; false: each rank holds all of
    them. Both compute the same update, and each resumes from the other's checkpoints."""
    threads_per_rank: int | None = None
    """CPU threads of a rank; torch chooses if not given."""

    def __post_init__(self) -> None:
        """Refuse sizes below one."""
        for name in (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "context_parallel_size",
            "micro_batch_tokens",
        ):
            require_positive("hardware", name, getattr(self, name))
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ValueError(
                "hardware.sequence_parallel: shares slots among tensor-parallel ranks, but "
                "hardware.tensor_parallel_size is 1"
            )
        if self.cuda_graphs:
            self._check_cuda_graphs()

    def _check_cuda_graphs(self) -> None:
        """Refuse layouts with other ranks in a graph, and settings that are decided in a step."""
        delays = self.is_fp8 is not False and self.keeps_fp8_maxima
        for field, refused, why in (
            ("tensor, pipeline and context parallel sizes", self.model_ranks > 1, "must be 1"),
            ("recompute", self.recomputes_layers, "must be none"),
            ("precision", self.parameter_precision == "fp32", "must be bf16, fp8 or auto"),
            ("fp8_recipe", delays, "must be tensorwise or blockwise"),
        ):
            if refused:
                raise ValueError(f"hardware.cuda_graphs: {field} {why}, or cuda_graphs false")

    @property
    def parameter_precision(self) -> Literal["fp32", "bf16"]:
        """Precision of weights and activations; auto, until it is resolved, counts as bf16."""
        match self.precision:
            case "fp32":
                return "fp32"
            case "bf16" | "fp8" | "auto":
                return "bf16"
            case _:
                assert_never(self.precision)

    @property
    def is_fp8(self) -> bool | None:
        """Tell whether the layers' linears run in fp8; None while precision is auto."""
        match self.precision:
            case "fp8":
                return True
            case "fp32" | "bf16":
                return False
            case "auto":
                return None
            case _:
                assert_never(self.precision)

    @property
    def keeps_fp8_maxima(self) -> bool:
        """Tell whether the fp8 recipe scales by the maxima of past steps."""
        match self.fp8_recipe:
            case "delayed":
                return True
            case "tensorwise" | "blockwise":
                return False
            case _:
                assert_never(self.fp8_recipe)

    @property
    def recomputes_layers(self) -> bool:
        """Tell whether the backward pass computes each layer's activations again."""
        match self.recompute:
            case "none":
                return False
            case "full":
                return True
            case _:
                assert_never(self.recompute)

    @property
    def model_ranks(self) -> int:
        """Ranks of one replica of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def slot_ranks(self) -> int:
        """Ranks that share the slots of a micro-batch between the layers' matmuls."""
        return self.context_parallel_size * (
            self.tensor_parallel_size if self.sequence_parallel else 1
        )

    def micro_batch_rows(self, seq_length: int) -> int:
        """Return the rows of `seq_length` slots that a micro-batch has.

        Raises:
            ValueError: not one row fits, or ranks that share slots cannot share them evenly.
        """
        rows = self.micro_batch_tokens // seq_length
        if not rows:
            raise ValueError(
                f"hardware.micro_batch_tokens: {self.micro_batch_tokens} holds no row of "
                f"{seq_length} slots"
            )
        if rows * seq_length % self.slot_ranks:
            raise ValueError(
                f"hardware: the {rows} x {seq_length} slots of a micro-batch cannot be shared "
                f"evenly by {self.slot_ranks} ranks (context_parallel_size "
                f"{self.context_parallel_size}, sequence_parallel over tensor_parallel_size "
                f"{self.tensor_parallel_size}): change micro_batch_tokens or the row length"
            )
        return rows


def check_layout(model: ModelConfig, hardware: HardwareConfig) -> None:
    """Raise ValueError if the model cannot be laid out over the ranks of one replica."""
    tensor, context = hardware.tensor_parallel_size, hardware.context_parallel_size
    for kind, size in (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
        ("padded vocabulary", model.padded_vocab_size),
    ):
        if size % tensor:
            raise ValueError(
                f"hardware.tensor_parallel_size: {tensor} does not divide {kind}: {size}"
            )
    if model.num_attention_heads // tensor % context:
        raise ValueError(
            f"hardware.context_parallel_size: {context} does not divide the "
            f"{model.num_attention_heads // tensor} heads of a tensor-parallel rank "
            f"(model.num_attention_heads: {model.num_attention_heads})"
        )
    if hardware.pipeline_parallel_size > model.num_layers:
        raise ValueError(
            f"hardware.pipeline_parallel_size: {hardware.pipeline_parallel_size} exceeds "
            f"model.num_layers: {model.num_layers}"
        )


def check_fp8(model: ModelConfig, hardware: HardwareConfig, seq_length: int) -> None:
    """Raise ValueError naming the field if fp8 matmuls cannot have the shapes of a run."""
    tensor = hardware.tensor_parallel_size
    slots = hardware.micro_batch_rows(seq_length) * seq_length
    for field, what, size, ranks in (
        ("hardware.micro_batch_tokens", "slots", slots, hardware.slot_ranks),
        ("model.hidden_size", "channels", model.hidden_size, tensor),
        ("model.ffn_hidden_size", "channels", model.ffn_hidden_size, tensor),
    ):
        if size % (ranks * FP8_MULTIPLE):
            raise ValueError(
                f"{field}: hardware.precision fp8 needs a multiple of {FP8_MULTIPLE} {what} on "
                f"each rank, but {size} are shared by {ranks}"
            )
