"""Run the Triton kernels of the MLP's activation in Triton's interpreter; print what is wrong.

The variable TRITON_INTERPRET must be 1 before triton is imported, so this is a process of its own.
"""

import itertools

import torch

from megatron_ettin.model.gated_gelu_triton import gated_gelu

#: Slots and channels: none, one, a part of a tile, more than a tile each way.
SHAPES = [(0, 4), (1, 1), (5, 48), (9, 130), (16, 384)]
#: Relative to the whole. The interpreter cuts to bfloat16; a GPU rounds to nearest.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}


def is_wrong(shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Say whether the product or its gradient differs from that of torch in float64."""
    slots, width = shape
    generator = torch.Generator().manual_seed(width)
    gated = (torch.randn(slots, 1, 2 * width, generator=generator) * 2).to(dtype)
    # Not contiguous, as the gradient of a transposed output is.
    incoming = torch.randn(width, 1, slots, generator=generator).to(dtype).transpose(0, 2)
    ours, exact = gated.clone().requires_grad_(), gated.double().requires_grad_()
    found = gated_gelu(ours)
    found.backward(incoming)
    x, gate = exact.chunk(2, dim=-1)
    expected = torch.nn.functional.gelu(x) * gate
    expected.backward(incoming.double())
    assert ours.grad is not None
    assert exact.grad is not None
    kept = found.dtype == ours.grad.dtype == dtype and found.shape == expected.shape
    pairs = [(found, expected), (ours.grad, exact.grad)]
    return not (kept and all(near(*pair, TOLERANCES[dtype]) for pair in pairs))


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return float((found.double() - expected).norm()) <= tolerance * float(expected.norm())


if __name__ == "__main__":
    cases = itertools.product(SHAPES, TOLERANCES)
    print("wrong:", [case for case in cases if is_wrong(*case)])
