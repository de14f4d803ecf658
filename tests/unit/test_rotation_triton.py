"""The kernels of rotary positions for GPUs: interpreted, compiled, run on a GPU."""

from pathlib import Path

import pytest

from tests.kernels import (
    NOTHING_WRONG,
    argument_types,
    assert_whole_vectors,
    compiled_for_hopper,
    interpreted,
)

pytest.importorskip("triton", reason="triton comes with the CUDA builds of torch")


def test_the_interpreted_kernels_equal_the_exact_rotation() -> None:
    assert interpreted("tests.unit.interpreted_rotation") == NOTHING_WRONG


@pytest.mark.parametrize(("kernel", "tiles"), [("rotate_rows", 4), ("pack_rows", 6)])
def test_the_kernels_compile_for_hopper(
    kernel: str, tiles: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ettin.model import rotation_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(rotation_triton, kernel)
    constants = {"ROWS": rotation_triton.ROWS, "HALF": 32}
    types = argument_types(function, constants, positions_ptr="*i64", table_ptr="*fp32")
    compiled = compiled_for_hopper(
        function,
        types,
        constants,
        # As for heads of 64 channels, and the tensors that torch allocates.
        by_16=[name for name in types if name.endswith(("_ptr", "_stride"))] + ["half"],
        options={"num_warps": rotation_triton.WARPS},
    )
    # Beside the tiles, cosines and sines.
    assert_whole_vectors(compiled, loads=tiles + 2, stores=tiles)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [4, 28])
def test_the_kernels_on_a_gpu_equal_complex_products(heads: int) -> None:
    import torch

    from megatron_ettin.model.rotation_triton import rotate_
    from tests.unit.interpreted_rotation import rotated_exactly

    slots, size = 1000, 64
    qkv = torch.randn(slots, heads, 3, size)
    positions = torch.arange(slots) % 512
    angles = torch.outer(torch.arange(512).double(), 1e4 ** -(torch.arange(32).double() / 32))
    table = torch.stack([angles.cos(), angles.sin()], dim=1).float()
    exact = qkv.double().requires_grad_()
    q, k, v = exact.unbind(dim=2)
    expected = [*(rotated_exactly(x, angles[positions]) for x in (q, k)), v]
    directions = [torch.randn(slots, heads, size) for _ in range(3)]
    torch.autograd.backward(expected, [x.double() for x in directions])
    ours = qkv.cuda().requires_grad_()
    found = rotate_(ours * 1.0, positions.cuda(), table.cuda())
    torch.autograd.backward(found, [x.cuda() for x in directions])
    for mine, theirs in [*zip(found, expected, strict=True), (ours.grad, exact.grad)]:
        assert mine is not None
        assert theirs is not None
        torch.testing.assert_close(mine.cpu().double(), theirs, rtol=1e-5, atol=1e-5)
