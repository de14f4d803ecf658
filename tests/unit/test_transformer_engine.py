"""Transformer Engine's own code where no GPU is: what it chooses, and where its gradients go.

It needs Transformer Engine, and so torch's CUDA build, but no device. What asks the device is
replaced: its compute capability, cuDNN's word that it has a kernel, and the matmul itself. These
tests ran on a CPU with Transformer Engine 2.20.2, Megatron-Core 0.19.2 and torch 2.11.0+cu130.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.model_sizes import model_of_size
from megatron_ettin.config import HardwareConfig, ModelConfig
from megatron_ettin.model.attention import random_projection
from megatron_ettin.model.attention_gpu import by_packed_kernel, packed_kernel
from megatron_ettin.model.backend import linears
from megatron_ettin.model.provider import transformer_config
from megatron_ettin.training.graphs import GraphedForwardBackward
from tests.numbers import Again, Number, number_step

pytestmark = pytest.mark.cuda_build
pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")

SIZES = ("nano", "17m", "32m", "68m", "150m", "400m", "1b")
#: (slots, longest segment, segments) of a micro-batch: rows of 1,024 by eighths and with graphs,
#: 1B's, and rows of 8,192.
MICRO_BATCHES = (
    (65_536, 1024, 225),
    (65_536, 1024, 330),
    (65_536, 1024, 512),
    (32_768, 1024, 176),
    (65_536, 8192, 330),
)
#: From here on Transformer Engine refuses a deterministic backward pass on Hopper.
REFUSED = 2**30
HOPPER = (9, 0)


class Chosen(Exception):  # noqa: N818
    """Ends a call of the attention as soon as its kernel is chosen."""


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Transformer Engine believe that it runs on one."""
    from transformer_engine.pytorch import utils
    from transformer_engine.pytorch.attention.dot_product_attention import utils as attention

    monkeypatch.setattr(utils, "_get_device_compute_capability", lambda _: HOPPER)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    fused = attention.FusedAttnBackend.F16_arbitrary_seqlen.value
    monkeypatch.setattr(attention, "_get_fused_attn_backend", lambda **_: (fused, ""))


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    model: ModelConfig,
    micro_batch: tuple[int, int, int],
    *,
    is_causal: bool,
    window: tuple[int, int] | None,
) -> tuple[bool, bool, bool]:
    """Return whether it takes flash-attn, cuDNN, or unfused attention for a call of a layer."""
    from transformer_engine.pytorch.attention.dot_product_attention import (
        dot_product_attention as attention,
    )

    choose, found = attention.dpa_utils.get_attention_backend, []

    def record(params: Any) -> None:
        # It asks for the type of the tensors, and these are fake.
        real = dataclasses.replace(params, qkv_type=torch.Tensor)
        flash, _, fused, _, unfused, _ = choose(real)
        found.append((bool(flash), bool(fused), bool(unfused)))
        assert real.qkv_layout == "thd_thd_thd"
        raise Chosen

    slots, longest, segments = micro_batch
    with monkeypatch.context() as patched:
        patched.setattr(attention.dpa_utils, "get_attention_backend", record)
        with patched.context() as building:
            building.setattr(torch.cuda, "is_available", lambda: True)
            kernel = packed_kernel(
                model.num_attention_heads, model.head_size, is_causal=is_causal, window=window
            )
        with FakeTensorMode(allow_non_fake_inputs=True):
            heads, size, gpu = model.num_attention_heads, model.head_size, torch.device("cuda")
            qkv = random_projection(slots, heads, size, dtype=torch.bfloat16, device=gpu)
            borders = torch.empty(segments + 1, dtype=torch.int32, device=gpu)
            with pytest.raises(Chosen):
                by_packed_kernel(kernel, *qkv, borders, longest)
    return found[0]


# It compares addresses of its inputs, which have none here; torch warns of that once a process.
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_its_attention_serves_each_shape_unless_it_has_to_repeat(
    size: str, is_deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refusals are why a deterministic run takes torch's kernel (attention_choice.py)."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", str(int(not is_deterministic)))
    model = model_of_size(size)
    for micro_batch in MICRO_BATCHES:
        for is_causal in (False, True):
            right = 0 if is_causal else model.sliding_window
            for window in (None, (model.sliding_window, right)):
                found = chosen(monkeypatch, model, micro_batch, is_causal=is_causal, window=window)
                _, longest, segments = micro_batch
                products = segments * model.num_attention_heads * longest**2
                serves = not (is_deterministic and products >= REFUSED)
                assert found == (False, serves, False), (micro_batch, is_causal, window)


class Linear(MegatronModule):  # type: ignore[misc]
    """Megatron-Core's linear of Transformer Engine, with an fp32 gradient; its sum is the loss."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        from megatron_ettin import distributed

        self.linear = linears("transformer_engine").column(
            config.hidden_size,
            config.ffn_hidden_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=True,
            is_expert=False,
            tp_group=distributed.tensor_parallel_group(),
        )
        torch.nn.init.ones_(self.linear.weight)
        self.linear.weight.main_grad = torch.zeros(self.linear.weight.shape)
        self.rotary = None
        self.model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, tensor: object) -> None:
        """Do nothing: one stage has no stage before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.to(torch.bfloat16).expand(16, 1, self.config.hidden_size).contiguous()
        return self.linear(rows.requires_grad_())[0].float().sum()


@pytest.fixture
def matmuls(monkeypatch: pytest.MonkeyPatch) -> list[bool | None]:
    """Compute Transformer Engine's matmuls with torch; return what weight gradients accumulated.

    None stands for a gradient that went elsewhere than to `main_grad`.
    """
    from transformer_engine.pytorch.cpp_extensions import gemm

    accumulated: list[bool | None] = []

    def multiply(
        a: torch.Tensor,
        transposes_a: bool,
        b: torch.Tensor,
        transposes_b: bool,
        out: torch.Tensor | None,
        *rest: Any,
        **_: Any,
    ) -> tuple[torch.Tensor, None, None, None]:
        adds = rest[9]
        a, b = a.flatten(0, -2), b.flatten(0, -2)
        product = (b.t() if transposes_b else b).double() @ (a.t() if transposes_a else a).double()
        if transposes_b:
            is_main = out is not None and out.dtype == torch.float32
            accumulated.append(adds if is_main else None)
        if out is None:
            return product.bfloat16(), None, None, None
        out.copy_(out + product if adds else product)
        return out, None, None, None

    workspace = torch.empty(16, dtype=torch.uint8)
    monkeypatch.setattr(gemm, "get_cublas_workspace", lambda *_: workspace)
    monkeypatch.setattr(gemm.tex, "generic_gemm", multiply)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return accumulated


@pytest.mark.usefixtures("hopper", "one_process")
@pytest.mark.parametrize(
    ("settings", "adds"),
    [
        ({"precision": "bf16"}, [False, True, True]),
        ({"precision": "bf16", "cuda_graphs": True}, [False, True, True]),
        ({"precision": "fp8"}, [False, True, True]),
        ({"precision": "fp8", "cuda_graphs": True}, [True, True, True]),
    ],
)
def test_its_weight_gradients_add_up_in_fp32(
    settings: dict[str, Any],
    adds: list[bool],
    matmuls: list[bool | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """fp8 by its flags; nothing is cast to fp8, since that needs a GPU."""
    model = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2)
    hardware = HardwareConfig(**settings)
    with monkeypatch.context() as building:
        building.setattr(torch.cuda, "is_available", lambda: True)
        stage = Linear(transformer_config(model, "causal", hardware, "transformer_engine"))
    run = cast(Callable[..., Any], get_forward_backward_func())
    if hardware.cuda_graphs:
        run = GraphedForwardBackward(cast(Any, stage), Again, finalize=lambda *_: None)
    stage.config.finalize_model_grads_func = None
    run(
        forward_step_func=number_step,
        data_iterator=iter([Number(torch.tensor([x])) for x in (1.0, 2.0, 4.0)]),
        model=stage,
        num_microbatches=3,
        seq_length=1,
        micro_batch_size=1,
    )
    assert matmuls == adds
    # 16 rows of ones times the number, summed over micro-batches.
    assert stage.linear.weight.main_grad.unique().tolist() == [16 * (1.0 + 2.0 + 4.0)]
    assert stage.linear.weight.main_grad.dtype == torch.float32
