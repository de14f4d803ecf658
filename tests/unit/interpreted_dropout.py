"""Run the Triton kernel of the dropout in Triton's interpreter; print the cases that are wrong.

The variable TRITON_INTERPRET must be 1 before triton is imported, so this is a process of its own.
"""

import itertools

import torch

from megatron_ettin.model.dropout import OutputDropout
from megatron_ettin.model.dropout_triton import drop

ROWS = [7, -1, 2**40, 0]
# One channel, draws that cross slots, draws that do not, more than one block of draws in a row.
SHAPES = [(5, 1), (3, 7), (6, 8), (40, 52)]
# (first slot, slots left out at the end): all, the middle, inside of one row.
RANGES = [(0, 0), (1, 0), (0, 2), (2, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def differences(seq_length: int, channels: int, cut: tuple[int, int], dtype: torch.dtype) -> bool:
    """Say whether the kernel and the C++ factors differ in a bit, forward or backward.

    Both multiply in float32 and round once.
    """
    generator = torch.Generator().manual_seed(5)
    g = torch.tensor(ROWS)
    first, left_out = cut
    slots = seq_length * len(ROWS) - first - left_out
    x = torch.randn(slots, 1, channels, generator=generator).to(dtype)
    # Not contiguous, as the gradient of a transposed output is.
    gradient = torch.randn(channels, 1, slots, generator=generator).to(dtype).transpose(0, 2)
    dropout = OutputDropout(rate=0.3, seed=2**64 - 3)
    got, layer = x.clone().requires_grad_(), 11
    out = drop(got, g, dropout.layer_draws(seq_length, layer, first))
    out.backward(gradient)

    def expected(value: torch.Tensor) -> torch.Tensor:
        if dtype is not torch.bfloat16:
            return dropout.apply(value, g, seq_length, layer, first)
        return cut_to_bfloat16(dropout.apply(value.float(), g, seq_length, layer, first))

    assert got.grad is not None
    return not (same_bits(out, expected(x)) and same_bits(got.grad, expected(gradient)))


def cut_to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """Cut the low bits of a float32, as the interpreter does; a GPU rounds to nearest."""
    return (x.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare as integers, so that -0 differs from 0."""
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.detach().view(integer), b.detach().view(integer))


if __name__ == "__main__":
    cases = itertools.product(SHAPES, RANGES, DTYPES)
    wrong = [(shape, cut, dtype) for shape, cut, dtype in cases if differences(*shape, cut, dtype)]
    print("wrong:", wrong)
