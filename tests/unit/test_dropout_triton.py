"""The dropout kernel for GPUs: the bits of the C++ factors, and it compiles where no GPU is."""

import re
from pathlib import Path

import pytest

from tests.kernels import NOTHING_WRONG, compiled_for_hopper, interpreted

pytest.importorskip("triton", reason="triton comes with the CUDA builds of torch")


def test_the_interpreted_kernel_equals_the_cpp_factors() -> None:
    assert interpreted("tests.unit.interpreted_dropout") == NOTHING_WRONG


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernel_compiles_for_hopper(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ettin.model.dropout_triton import BLOCK_DRAWS, multiply_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "g_ptr": "*i64"}
    numbers = {"key": "u64", "threshold": "i32", "kept": "fp32"}
    sizes = ["row_size", "first", "count", "first_row", "blocks_per_row"]
    compiled = compiled_for_hopper(
        multiply_rows,
        {**pointers, **numbers, **dict.fromkeys(sizes, "i32")},
        {"BLOCK": BLOCK_DRAWS},
    )
    ptx = compiled["ptx"]
    # Draws are shifted without their sign: an arithmetic shift of 64 bits would be wrong.
    assert re.search(r"\bshr\.u64\b", ptx)
    assert not re.search(r"\bshr\.s64\b.*, (27|30|31);", ptx)
    # The interpreter cuts to bfloat16, so that a GPU rounds to nearest is seen here.
    assert (dtype == "bf16") == bool(re.search(r"\bcvt\.rn\.bf16", ptx))
    assert "cubin" in compiled


@pytest.mark.gpu
@pytest.mark.parametrize("first_slot", [0, 37])
def test_the_kernel_on_a_gpu_equals_the_cpp_factors(first_slot: int) -> None:
    import torch

    from megatron_ettin.model.dropout import OutputDropout

    dropout, seq_length = OutputDropout(rate=0.1, seed=21), 128
    g = torch.tensor([3, -1, 2**40])
    for channels in (6, 256, 1792):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(3 * seq_length - first_slot - 5, 1, channels).to(dtype)
            cpu, gpu = x.clone().requires_grad_(), x.cuda().requires_grad_()
            expected = dropout.apply(cpu, g, seq_length, 4, first_slot)
            got = dropout.apply(gpu, g.cuda(), seq_length, 4, first_slot)
            expected.backward(x)
            got.backward(x.cuda())
            assert torch.equal(got.cpu(), expected)
            assert torch.equal(gpu.grad.cpu(), cpu.grad)
