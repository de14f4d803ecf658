"""Outputs of a model for one packed stream, on this rank's device: logits and gradients.

Run as a program, `python -m tests.gpu.outputs SIZE FILE`, it leaves in FILE the random weights of a
size of examples/model/ and what its two objectives make of them in fp32. Without a visible GPU that
is the CPU's path, which tests/parity/ compares with transformers: the reference of the tests here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig, ModelConfig, SeedConfig
from megatron_ettin.model.attention import KindAndLength, PackedRows
from megatron_ettin.model.backend import choose_backend
from megatron_ettin.model.ettin_model import EttinModel
from megatron_ettin.model.provider import Attention, build_stage, logical_parameters
from tests.parity.references import Packed

EXAMPLES = Path(__file__).parents[2] / "examples" / "model"
ATTENTIONS: tuple[Attention, ...] = ("bidirectional", "causal")
#: Around the window of 64, past twice that, and a single token; zeros are the empty segments of a
#: row's tail. 640 slots: a multiple of what every fp8 recipe asks for.
DOCUMENTS = (66, 1, 200, 63, 130, 64, 65, 51, 0, 0)
SEQ_LENGTH = sum(DOCUMENTS)


@dataclass(frozen=True)
class Outputs:
    """On the CPU, in float32."""

    logits: torch.Tensor
    """[t, vocab], without dropout."""
    gradients: dict[str, torch.Tensor]
    """Gradients of the summed loss, with dropout, by parameter."""


def example(size: str) -> ModelConfig:
    """Return the model of examples/model/SIZE.yaml."""
    return ModelConfig(**yaml.safe_load((EXAMPLES / f"{size}.yaml").read_text())["model"])


def random_weights(stage: EttinModel) -> dict[str, torch.Tensor]:
    """Return weights in bf16, by parameter, under which attention is far from uniform.

    Initial ones are so small that it would hide errors. bf16, so that all precisions start equal.
    """
    generator, weights = torch.Generator().manual_seed(11), {}
    for name, parameter in logical_parameters(stage):
        noise = torch.randn(parameter.shape, generator=generator)
        is_matrix = parameter.dim() > 1
        drawn = noise * parameter.shape[1] ** -0.5 if is_matrix else 1.0 + 0.06 * noise
        weights[name] = drawn.bfloat16()
    return weights


def build(
    model: ModelConfig,
    attention: Attention,
    hardware: HardwareConfig,
    weights: Mapping[str, torch.Tensor] | None = None,
    by_engine: frozenset[KindAndLength] = frozenset(),
) -> EttinModel:
    """Return the model with `weights` (random ones if not given) on this rank's device.

    Transformer Engine computes the attention of the layers `by_engine`, over rows of the lengths
    there.
    """
    backend = choose_backend(model, hardware)
    stage = build_stage(model, attention, hardware, SeedConfig(), backend, by_engine)
    weights = random_weights(stage) if weights is None else weights
    with torch.no_grad():
        for name, parameter in logical_parameters(stage):
            parameter.copy_(weights[name])
    return stage.to(distributed.device())


def packed_rows(packed: Packed) -> PackedRows:
    """Describe a stream that is one row of at most SEQ_LENGTH slots, on this rank's device."""
    device = distributed.device()
    return PackedRows.of(
        packed.cu_seqlens.to(device),
        SEQ_LENGTH,
        packed.position_ids.to(device),
        g=torch.tensor([0], device=device),
    )


def logits(stage: EttinModel, packed: Packed) -> torch.Tensor:
    """Return [t, vocab] of the stream, without dropout, on the CPU in float32."""
    stage.eval()
    stage.set_is_first_microbatch()
    with torch.no_grad():
        found = stage(packed.tokens.to(distributed.device()), packed_rows(packed))
    assert isinstance(found, torch.Tensor)
    return found.float().cpu()


def gradients(stage: EttinModel, packed: Packed) -> dict[str, torch.Tensor]:
    """Return the gradients of the loss summed over a third of the slots, by parameter.

    They are taken where training takes them: from the fp32 sums of Megatron-Core's wrapper.
    """
    device = distributed.device()
    scored = torch.arange(0, len(packed.tokens), 3)
    labels = packed.tokens.flip(0)[scored]
    stage.train()
    ddp = DistributedDataParallel(
        stage.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), stage
    )
    ddp.zero_grad_buffer()
    stage.set_is_first_microbatch()
    loss = ddp(
        tokens=packed.tokens.to(device),
        packed=packed_rows(packed),
        scored=scored.to(device),
        labels=labels.to(device),
    )
    loss.total.backward()
    return {name: p.main_grad.float().cpu() for name, p in logical_parameters(stage)}


def outputs(stage: EttinModel) -> Outputs:
    """Return what `stage` makes of the documents."""
    packed = Packed.random(stage.model_config.vocab_size, DOCUMENTS)
    return Outputs(gradients=gradients(stage, packed), logits=logits(stage, packed))


def relative_l2(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |found - expected| / |expected| in the L2 norm."""
    assert found.shape == expected.shape
    mine, theirs = (x.to(distributed.device()).float() for x in (found, expected))
    return float((mine - theirs).norm() / theirs.norm())


def worst_tensor(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> tuple[float, str]:
    """Return the largest relative L2 distance of a tensor, and its name."""
    assert set(found) == set(expected)
    return max((relative_l2(found[name], tensor), name) for name, tensor in expected.items())


def main() -> None:
    size, file = sys.argv[1:]
    model, hardware = example(size), HardwareConfig()
    with distributed.process_groups(hardware):
        weights = random_weights(build_stage(model, "causal", hardware, SeedConfig()))
        found = {
            attention: vars(outputs(build(model, attention, hardware, weights)))
            for attention in ATTENTIONS
        }
    torch.save({"weights": weights, **found}, file)


if __name__ == "__main__":
    main()
