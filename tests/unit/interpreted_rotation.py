"""Run the kernels of rotary positions in Triton's interpreter; print the cases that are wrong.

The variable TRITON_INTERPRET must be 1 before triton is imported, so this is a process of its own.
"""

import itertools

import torch

from megatron_ettin.model.rotation_triton import rotate_

#: Slots, heads, channels of a head: none, a part of a program's rows, several programs, a half that
#: is no power of two.
SHAPES = [(0, 2, 64), (5, 3, 64), (24, 4, 32), (7, 2, 12)]
POSITIONS = 40
#: Relative to the whole. The interpreter cuts to bfloat16; a GPU rounds to nearest.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}


def rotated_exactly(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Return x [t, heads, size] rotated by angles [t, size / 2], as complex numbers, in float64."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def is_wrong(shape: tuple[int, int, int], dtype: torch.dtype, is_strided: bool) -> bool:
    """Say whether q, k, v or the gradient of the buffer differs from float64."""
    slots, heads, size = shape
    generator = torch.Generator().manual_seed(slots)
    qkv = torch.randn(slots, heads, 3, size, generator=generator).to(dtype)
    positions = torch.randint(0, POSITIONS, (slots,), generator=generator)
    frequencies = 100.0 ** -(torch.arange(size // 2).double() * 2 / size)
    by_position = torch.outer(torch.arange(POSITIONS).double(), frequencies)
    table = torch.stack([by_position.cos(), by_position.sin()], dim=1).float()
    gradients = [
        # Not contiguous: every second head of a longer tensor.
        torch.randn(slots, 2 * heads, size, generator=generator).to(dtype)[:, ::2]
        if is_strided
        else torch.randn(slots, heads, size, generator=generator).to(dtype)
        for _ in range(3)
    ]
    exact = qkv.double().requires_grad_()
    q, k, v = exact.unbind(dim=2)
    angles = by_position[positions]
    expected = [rotated_exactly(q, angles), rotated_exactly(k, angles), v]
    torch.autograd.backward(expected, [x.double() for x in gradients])

    given = qkv.clone().requires_grad_()
    buffer = given * 1.0  # as the projection's output: not a leaf
    found = rotate_(buffer, positions, table)
    torch.autograd.backward(found, gradients)
    in_place = all(x.data_ptr() == buffer[:, :, i].data_ptr() for i, x in enumerate(found))
    pairs = [*zip(found, expected, strict=True), (given.grad, exact.grad)]
    return not (in_place and all(near(*pair, TOLERANCES[dtype]) for pair in pairs))


def near(found: torch.Tensor | None, expected: torch.Tensor | None, tolerance: float) -> bool:
    assert found is not None
    assert expected is not None
    difference = (found.detach().double() - expected.detach()).norm()
    return float(difference) <= tolerance * float(expected.detach().norm())


if __name__ == "__main__":
    cases = itertools.product(SHAPES, TOLERANCES, [False, True])
    print("wrong:", [case for case in cases if is_wrong(*case)])
