"""Logits and gradients on a GPU against the CPU's in fp32, for every size, objective and backend.

All start from the same weights, which bf16 holds exactly. What is measured is printed with -v.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig, ModelConfig
from megatron_ettin.model.attention import CoreAttention, KindAndLength
from megatron_ettin.model.attention_gpu import TransformerEngineCoreAttention
from megatron_ettin.model.provider import Attention
from tests.gpu.conftest import BACKENDS, run_without_gpu, skip_without
from tests.gpu.outputs import (
    ATTENTIONS,
    DOCUMENTS,
    SEQ_LENGTH,
    Outputs,
    build,
    example,
    logits,
    outputs,
    relative_l2,
    worst_tensor,
)
from tests.parity.references import Packed, difference

pytestmark = pytest.mark.gpu

SIZES = ("nano", "17m", "32m", "68m", "150m", "400m", "1b")
#: In fp32: of the largest logit, and the relative L2 distance of a gradient. Sums in another order
#: cost a CPU 1e-6 of each; float32 products of attention in tensor cores are a little less exact.
FP32_LOGITS, FP32_GRADIENTS = 2e-5, 1e-4
#: In bf16: relative L2 distance of the logits, for each root of the layers, whose roundings add up
#: at random. The CPU's own bf16 is 0.0039 away, for 4 to 10 layers.
BF16_LOGITS = 0.006

Record = Callable[[str, object], None]


class Reference:
    """The weights of a size, what the CPU made of them, and what the GPU makes of them."""

    def __init__(self, size: str, file: Path) -> None:
        """Compute the CPU's outputs in a process without a GPU."""
        run_without_gpu("tests.gpu.outputs", size, str(file))
        saved = torch.load(file, mmap=True)
        self.model, self.weights = example(size), saved.pop("weights")
        self.expected = {name: Outputs(**found) for name, found in saved.items()}
        self._found: dict[tuple[str, str, str], Outputs] = {}

    def on_gpu(self, attention: Attention, precision: Any, backend: Any = "local") -> Outputs:
        """Return the GPU's outputs, computed once."""
        key = attention, precision, backend
        if key not in self._found:
            model = dataclasses.replace(self.model, backend=backend)
            hardware = HardwareConfig(precision=precision)
            with distributed.process_groups(hardware):
                self._found[key] = outputs(build(model, attention, hardware, self.weights))
        return self._found[key]

    @property
    def bf16_logits(self) -> float:
        return BF16_LOGITS * math.sqrt(self.model.num_layers)

    @property
    def bf16_gradients(self) -> float:
        """For the worst tensor: the CPU's own has norms at 0.04, and most grow like the logits."""
        return 0.02 + 0.015 * math.sqrt(self.model.num_layers)


@pytest.fixture(scope="module", params=SIZES)
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Reference]:
    file = tmp_path_factory.mktemp(request.param) / "reference.pt"
    yield Reference(request.param, file)
    # The largest takes gigabytes.
    file.unlink()
    torch.cuda.empty_cache()


def compare(found: Outputs, expected: Outputs, record: Record) -> tuple[float, float]:
    """Return and record the relative L2 distances of the logits and of the worst gradient."""
    of_logits = relative_l2(found.logits, expected.logits)
    of_gradient, name = worst_tensor(found.gradients, expected.gradients)
    record("logits", f"{of_logits:.1e}")
    record("gradient", f"{of_gradient:.1e} ({name})")
    return of_logits, of_gradient


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_fp32_equals_the_cpu(
    reference: Reference, attention: Attention, record_property: Record
) -> None:
    found, expected = reference.on_gpu(attention, "fp32"), reference.expected[attention]
    _, of_gradient = compare(found, expected, record_property)
    assert difference(found.logits, expected.logits) <= FP32_LOGITS
    assert of_gradient <= FP32_GRADIENTS


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_is_near_the_cpus_fp32(
    reference: Reference, attention: Attention, backend: str, record_property: Record
) -> None:
    skip_without(backend)
    found = reference.on_gpu(attention, "bf16", backend)
    of_logits, of_gradient = compare(found, reference.expected[attention], record_property)
    assert of_logits <= reference.bf16_logits
    assert of_gradient <= reference.bf16_gradients


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_backends_agree_in_bf16(
    reference: Reference, attention: Attention, record_property: Record
) -> None:
    skip_without("transformer_engine")
    engine, local = (reference.on_gpu(attention, "bf16", backend) for backend in reversed(BACKENDS))
    of_logits, of_gradient = compare(engine, local, record_property)
    assert of_logits <= reference.bf16_logits
    assert of_gradient <= reference.bf16_gradients


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("reference", ["nano"], indirect=True)
def test_transformer_engines_attention_in_a_model_is_near_the_cpus_fp32(
    reference: Reference, attention: Attention, record_property: Record
) -> None:
    """Of layers of both kinds; elsewhere torch's kernel attends, for no run has measured them."""
    skip_without("transformer_engine")
    model = dataclasses.replace(reference.model, backend="transformer_engine")
    hardware = HardwareConfig(precision="bf16")
    with distributed.process_groups(hardware):
        by_engine: frozenset[KindAndLength] = frozenset(
            {("global", SEQ_LENGTH), ("local", SEQ_LENGTH)}
        )
        stage = build(model, attention, hardware, reference.weights, by_engine)
        kinds = [type(part) for part in stage.modules() if isinstance(part, CoreAttention)]
        found = outputs(stage)
    assert kinds == [TransformerEngineCoreAttention] * model.num_layers
    of_logits, of_gradient = compare(found, reference.expected[attention], record_property)
    assert of_logits <= reference.bf16_logits
    assert of_gradient <= reference.bf16_gradients


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_document_in_a_row_is_as_if_alone(
    attention: Attention, backend: Any, record_property: Record
) -> None:
    skip_without(backend)
    model: ModelConfig = dataclasses.replace(example("nano"), backend=backend)
    hardware = HardwareConfig(precision="bf16")
    packed = Packed.random(model.vocab_size, DOCUMENTS)
    lengths = [length for length in DOCUMENTS if length]
    with distributed.process_groups(hardware):
        stage = build(model, attention, hardware)
        in_a_row = logits(stage, packed).split(lengths)
        for document, found in zip(packed.documents(), in_a_row, strict=False):
            # As many segments as in training, empty but for the first.
            borders = torch.tensor([0, *[len(document)] * len(DOCUMENTS)], dtype=torch.int32)
            alone = Packed(document, borders, torch.arange(len(document)))
            distance = relative_l2(found, logits(stage, alone))
            record_property(f"{len(document)} tokens", f"{distance:.1e}")
            assert distance <= BF16_LOGITS * math.sqrt(model.num_layers)
