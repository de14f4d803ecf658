"""The kernels of the MLP's activation for GPUs: interpreted, compiled, run on a GPU."""

from pathlib import Path

import pytest

from tests.kernels import (
    NOTHING_WRONG,
    assert_whole_vectors,
    compiled_for_hopper,
    interpreted,
)

pytest.importorskip("triton", reason="triton comes with the CUDA builds of torch")


def test_the_interpreted_kernels_equal_the_exact_activation() -> None:
    assert interpreted("tests.unit.interpreted_gated_gelu") == NOTHING_WRONG


@pytest.mark.parametrize("kernel", ["multiply", "differentiate"])
def test_the_kernels_compile_for_hopper(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ettin.model import gated_gelu_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(gated_gelu_triton, kernel)
    names = function.arg_names
    pointers = [name for name in names if name.endswith("_ptr")]
    compiled = compiled_for_hopper(
        function,
        {**dict.fromkeys(pointers, "*bf16"), "rows": "i32", "width": "i32"},
        {"ROWS": gated_gelu_triton.ROWS, "COLUMNS": gated_gelu_triton.COLUMNS},
        # As for the published widths, and the tensors that torch allocates.
        by_16=[*pointers, "width"],
        options={"num_warps": gated_gelu_triton.WARPS},
    )
    # Tiles: the input's halves, and backward also the gradient.
    loads, stores = {"multiply": (2, 1), "differentiate": (3, 2)}[kernel]
    assert_whole_vectors(compiled, loads=loads, stores=stores)


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
