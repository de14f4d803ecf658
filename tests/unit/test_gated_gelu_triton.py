"""The kernels of the MLP's activation for GPUs: interpreted, compiled, run on a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton comes with the CUDA builds of torch")

ROOT = Path(__file__).parents[2]


def test_the_interpreted_kernels_equal_the_exact_activation() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.interpreted_gated_gelu"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "wrong: []\n", done.stdout + done.stderr


@pytest.mark.parametrize("kernel", ["multiply", "differentiate"])
def test_the_kernels_compile_for_hopper(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_ettin.model import gated_gelu_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(gated_gelu_triton, kernel)
    names = function.arg_names
    types = {"rows": "i32", "width": "i32", "ROWS": "constexpr", "COLUMNS": "constexpr"}
    # As Triton specialises the published widths and the tensors that torch allocates.
    by_16 = [name for name in names if name.endswith("_ptr") or name == "width"]
    compiled = triton.compile(
        ASTSource(
            function,
            {name: types.get(name, "*bf16") for name in names},
            {"ROWS": gated_gelu_triton.ROWS, "COLUMNS": gated_gelu_triton.COLUMNS},
            {(names.index(name),): [["tt.divisibility", 16]] for name in by_16},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": gated_gelu_triton.WARPS},
    )
    ptx = compiled.asm["ptx"]
    # 16 bytes of a thread at a time, in registers, rounded to nearest.
    assert re.search(r"ld\.global\.v4\.b32", ptx)
    assert re.search(r"st\.global\.v4\.b32", ptx)
    assert not re.search(r"\b(ld|st)\.local", ptx)
    assert re.search(r"\bcvt\.rn\.bf16", ptx)
    assert "cubin" in compiled.asm


@pytest.mark.gpu
@pytest.mark.parametrize("width", [50, 384, 1152])
def test_the_kernels_on_a_gpu_equal_the_exact_activation(width: int) -> None:
    import torch

    from megatron_ettin.model.gated_gelu_triton import gated_gelu

    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)):
        gated, incoming = torch.randn(77, 1, 2 * width).to(dtype), torch.randn(77, 1, width)
        ours, exact = gated.cuda().requires_grad_(), gated.double().requires_grad_()
        found = gated_gelu(ours)
        found.backward(incoming.to(dtype).cuda())
        x, gate = exact.chunk(2, dim=-1)
        expected = torch.nn.functional.gelu(x) * gate
        expected.backward(incoming.to(dtype).double())
        for got, wanted in ((found, expected), (ours.grad, exact.grad)):
            assert got is not None
            assert wanted is not None
            distance = (got.cpu().double() - wanted).norm() / wanted.norm()
            assert float(distance) <= tolerance
