"""Gradients add up over the micro-batches of a step, whatever Transformer Engine is told of them.

Megatron-Core tells it which micro-batch is the first of a step. Under fp8 it then overwrites the
gradient. Megatron-Core's own schedule and our graphs run here; the linear stands in for theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ettin.config import HardwareConfig, ModelConfig
from megatron_ettin.model.provider import transformer_config
from megatron_ettin.training.graphs import GraphedForwardBackward
from tests.numbers import Again, Number, number_step

pytestmark = pytest.mark.usefixtures("one_process")

MODEL = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2)
#: Their sum shows which of them were lost.
INPUTS = (1.0, 10.0, 100.0, 1000.0)
STEPS = 2


class Linear(MegatronModule):  # type: ignore[misc]
    """Multiplies by a weight whose gradient goes to `main_grad` as under Transformer Engine."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.main_grad = torch.zeros(1)
        self.is_first_microbatch = True
        self.told: list[bool | None] = []
        self.rotary = None
        self.model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, tensor: object) -> None:
        """Do nothing: one stage has no stage before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # megatron/core/extensions/transformer_engine.py, TELinear.forward
        keeps_no_cache = self.config.disable_parameter_transpose_cache
        told = None if keeps_no_cache else self.is_first_microbatch
        self.is_first_microbatch = False
        self.told.append(told)
        product = self.weight * x
        # transformer_engine/pytorch/module/linear.py, accumulate_wgrad_into_param_main_grad
        accumulates = True if told is None else not told

        def add(gradient: torch.Tensor) -> None:
            before = self.main_grad if accumulates else torch.zeros(1)
            self.main_grad.copy_(before + gradient * x)

        product.register_hook(add)
        return product.sum()


def forward_backward(stage: Linear, hardware: HardwareConfig) -> Callable[..., Any]:
    """Return what a run with these settings takes."""
    if hardware.cuda_graphs:
        return GraphedForwardBackward(cast(Any, stage), Again, finalize=lambda *_: None)
    return cast(Callable[..., Any], get_forward_backward_func())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"precision": "bf16"}, [True, *[False] * 7]),
        ({"precision": "bf16", "cuda_graphs": True}, [True, *[False] * 7]),
        ({"precision": "fp8"}, [True, False, False, False] * STEPS),
        ({"precision": "fp8", "fp8_recipe": "blockwise"}, [True, False, False, False] * STEPS),
        ({"precision": "fp8", "cuda_graphs": True}, [None] * 8),
        ({"precision": "fp8", "fp8_recipe": "blockwise", "cuda_graphs": True}, [None] * 8),
    ],
)
def test_gradients_add_up(settings: dict[str, Any], told: list[bool | None]) -> None:
    hardware = HardwareConfig(**settings)
    stage = Linear(transformer_config(MODEL, "causal", hardware))
    run = forward_backward(stage, hardware)
    for _ in range(STEPS):
        stage.main_grad.zero_()
        run(
            forward_step_func=number_step,
            data_iterator=iter([Number(torch.tensor([x])) for x in INPUTS]),
            model=stage,
            num_microbatches=len(INPUTS),
            seq_length=1,
            micro_batch_size=1,
        )
        assert stage.main_grad.tolist() == [sum(INPUTS)]
    assert stage.told == told
