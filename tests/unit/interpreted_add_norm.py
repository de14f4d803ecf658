"""Run the kernels of residual, dropout and norm in Triton's interpreter; print what is wrong.

The variable TRITON_INTERPRET must be 1 before triton is imported, so this is a process of its own.
"""

import itertools

import torch

from megatron_ettin.model import add_norm_triton
from megatron_ettin.model.add_norm_triton import add_and_normalise, normalise
from megatron_ettin.model.dropout import LayerDropout, OutputDropout

G = torch.tensor([7, -1, 2**40, 0])
#: Slots of a row and channels: a tile and less, widths that are no power of two, several tiles.
SHAPES = [(1, 4), (5, 48), (6, 256), (3, 1792)]
#: (first slot, slots left out at the end): all, the middle, inside of one row.
RANGES = [(0, 0), (1, 0), (2, 1)]
#: Relative to the whole. The interpreter cuts to bfloat16; a GPU rounds to nearest.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6}
EPSILON = 1e-5

Tensors = list[torch.Tensor]


def inputs(slots: int, channels: int, dtype: torch.dtype) -> Tensors:
    """Return branch, residual, weight and the gradients of sum and norm, which are not contiguous.

    Means are not near zero, so that a norm without centring is seen.
    """
    generator = torch.Generator().manual_seed(channels)
    branch, residual = (
        torch.randn(slots, 1, channels, generator=generator).add(shift).to(dtype)
        for shift in (0.3, 1.0)
    )
    weight = torch.rand(channels, generator=generator).add(0.5).to(dtype)
    gradients = [
        torch.randn(channels, 1, slots, generator=generator).to(dtype).transpose(0, 2)
        for _ in range(2)
    ]
    return [branch, residual, weight, *gradients]


def exact(given: Tensors, dropout: LayerDropout | None) -> Tensors:
    """Return sum, norm and the gradients of branch, residual and weight in float64, by torch."""
    branch, residual, weight = (x.double().requires_grad_() for x in given[:3])
    hidden = residual + (branch if dropout is None else dropout.apply(branch))
    normed = torch.nn.functional.layer_norm(hidden, weight.shape, weight, None, EPSILON)
    torch.autograd.backward([hidden, normed], [x.double() for x in given[3:]])
    return [
        hidden,
        normed,
        *(grad for x in (branch, residual, weight) if (grad := x.grad) is not None),
    ]


def is_wrong(
    shape: tuple[int, int], cut: tuple[int, int], dtype: torch.dtype, rate: float | None
) -> bool:
    """Say whether sum, norm or a gradient differs from that of torch in float64."""
    seq_length, channels = shape
    first, left_out = cut
    slots = max(seq_length * len(G) - first - left_out, 0)
    given = inputs(slots, channels, dtype)
    dropout = None
    if rate is not None:
        dropout = LayerDropout(OutputDropout(rate, seed=2**64 - 3), 11, G, seq_length, first)
    ours = [x.clone().requires_grad_() for x in given[:3]]
    found = add_and_normalise(*ours[:2], ours[2], EPSILON, dropout)
    torch.autograd.backward(found, given[3:])
    return far([*found, *(x.grad for x in ours)], exact(given, dropout), dtype)


def plain_is_wrong(rows: int, channels: int, dtype: torch.dtype) -> bool:
    """Say whether the norm alone, or a gradient of it, differs from that of torch in float64."""
    _, x, weight, _, gradient = inputs(rows, channels, dtype)
    ours = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    reference = [x.double().requires_grad_(), weight.double().requires_grad_()]
    found = normalise(*ours, EPSILON)
    found.backward(gradient)
    expected = torch.nn.functional.layer_norm(
        reference[0], (channels,), reference[1], None, EPSILON
    )
    expected.backward(gradient.double())
    return far([found, *(x.grad for x in ours)], [expected, *(x.grad for x in reference)], dtype)


def drops_other_bits(seq_length: int, channels: int) -> bool:
    """Say whether a channel differs, without a residual, from the C++ factors' product in a bit."""
    dropout = LayerDropout(OutputDropout(0.3, seed=5), 2, G, seq_length, 0)
    branch = torch.randn(
        seq_length * len(G), 1, channels, generator=torch.Generator().manual_seed(1)
    )
    branch[0, 0, 0] = float("nan")
    expected = dropout.apply(branch)
    found, _ = add_and_normalise(
        branch, torch.zeros_like(branch), torch.ones(channels), EPSILON, dropout
    )
    return not torch.equal(
        found.view(torch.int32)[1:], (expected + 0.0).view(torch.int32)[1:]
    ) or not bool(found[0, 0, 0].isnan())


def far(
    found: list[torch.Tensor | None], expected: list[torch.Tensor | None], dtype: torch.dtype
) -> bool:
    """Say whether a tensor is absent, of another type, or far from the expected one."""
    for mine, theirs in zip(found, expected, strict=True):
        if mine is None or theirs is None or mine.dtype != dtype:
            return True
        distance = float((mine.detach().double() - theirs.detach()).norm())
        if not distance <= TOLERANCES[dtype] * float(theirs.detach().norm()):
            return True
    return False


if __name__ == "__main__":
    cases = itertools.product(SHAPES, RANGES, TOLERANCES, [None, 0.3])
    wrong: list[object] = [case for case in cases if is_wrong(*case)]
    # Few programs, so that each has several tiles; then no row at all.
    add_norm_triton.MOST_PROGRAMS = 3
    wrong += [
        case for case in itertools.product([61, 0], [48], TOLERANCES) if plain_is_wrong(*case)
    ]
    wrong += [shape for shape in ((5, 48), (6, 256)) if drops_other_bits(*shape)]
    print("wrong:", wrong)
