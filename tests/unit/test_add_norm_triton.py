"""The kernels of residual, dropout and norm for GPUs: interpreted, compiled, run on a GPU."""

import re
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


def test_the_interpreted_kernels_equal_the_exact_norm_and_the_cpp_factors() -> None:
    assert interpreted("tests.unit.interpreted_add_norm") == NOTHING_WRONG


@pytest.mark.parametrize("channels", [256, 1792])
@pytest.mark.parametrize(
    ("kernel", "parts", "loads", "stores"),
    [
        # Places where a tile of bfloat16 is read and written.
        ("forward_rows", {"ADDS": 1, "DROPS": 1}, 2, 2),
        ("forward_rows", {"ADDS": 0, "DROPS": 0}, 1, 1),
        ("backward_rows", {"HAS_INCOMING": 1, "DROPS": 1}, 3, 2),
        ("backward_rows", {"HAS_INCOMING": 0, "DROPS": 0}, 2, 1),
    ],
)
def test_the_kernels_compile_for_hopper(
    kernel: str,
    parts: dict[str, int],
    loads: int,
    stores: int,
    channels: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron_ettin.model import add_norm_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(add_norm_triton, kernel)
    constants = {**parts, **add_norm_triton.tile(channels)}
    others = {"g_ptr": "*i64", "key": "u64", "kept": "fp32", "epsilon": "fp32"}
    types = argument_types(function, constants, **others, of_rows_ptr="*fp32", partial_ptr="*fp32")
    compiled = compiled_for_hopper(
        function,
        types,
        constants,
        # As for the published widths, and the tensors that torch allocates.
        by_16=[*(name for name in types if name.endswith("_ptr")), "channels"],
        options={"num_warps": add_norm_triton.WARPS},
    )
    assert_whole_vectors(compiled, loads=loads, stores=stores)
    # Nothing is summed atomically, so results repeat.
    assert not re.search(r"\b(atom|red)\.", compiled["ptx"])
    if parts["DROPS"]:
        # Draws are shifted without their sign: an arithmetic shift of 64 bits would be wrong.
        assert re.search(r"\bshr\.u64\b", compiled["ptx"])
        assert not re.search(r"\bshr\.s64\b.*, (27|30|31|48);", compiled["ptx"])


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [None, 0.1])
@pytest.mark.parametrize(("slots", "channels"), [(3 * 128 - 42, 256), (65_536, 768), (300, 1792)])
def test_the_kernels_on_a_gpu_equal_the_cpu(slots: int, channels: int, rate: float | None) -> None:
    import torch

    from megatron_ettin.model.add_norm_triton import add_and_normalise
    from megatron_ettin.model.dropout import LayerDropout, OutputDropout

    g = torch.tensor([3, -1, 2**40, *range(600)])
    branch, residual = (torch.randn(slots, 1, channels) for _ in range(2))
    weight = torch.rand(channels)
    directions = [torch.randn(slots, 1, channels) for _ in range(2)]

    def computed(device: str) -> list[torch.Tensor]:
        inputs = [x.to(device).requires_grad_() for x in (branch, residual, weight)]
        dropout = None
        if rate is not None:
            dropout = LayerDropout(OutputDropout(rate, seed=21), 4, g.to(device), 128, 37)
        if device == "cuda":
            outs = add_and_normalise(*inputs[:2], inputs[2], 1e-5, dropout)
        else:
            total = inputs[1] + (inputs[0] if dropout is None else dropout.apply(inputs[0]))
            normed = torch.nn.functional.layer_norm(total, (channels,), inputs[2], None, 1e-5)
            outs = total, normed
        torch.autograd.backward(outs, [x.to(device) for x in directions])
        return [*outs, *(x.grad for x in inputs if x.grad is not None)]

    for mine, theirs in zip(computed("cuda"), computed("cpu"), strict=True):
        # float32 sums in another order; those of the weight's gradient are of all slots.
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-3)
