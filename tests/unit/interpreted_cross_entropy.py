"""Run the Triton kernels of the loss in Triton's interpreter; print the cases that are wrong.

The variable TRITON_INTERPRET must be 1 before triton is imported, so this is a process of its own.
"""

import itertools

import torch

from megatron_ettin.model.cross_entropy_triton import BLOCK_COLUMNS, gradient_, statistics

#: Columns, those that are no padding, ranks that share the columns. The last rank of the third and
#: all but the first rank of the fourth have padding only; the last needs two blocks.
SHAPES = [(1, 1, 1), (37, 30, 1), (128, 96, 4), (128, 32, 4), (BLOCK_COLUMNS + 6, 4099, 1)]
#: Spreads of the logits: a softmax that is flat, usual, and of one column; exp(1e4) overflows.
SPREADS = [1e-3, 3.0, 1e4]
#: Relative to the whole. The interpreter cuts to bfloat16; a GPU rounds to nearest.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
ROWS = 7


def is_wrong(shape: tuple[int, int, int], spread: float, dtype: torch.dtype) -> bool:
    """Say whether losses or gradients differ from those of torch in float64."""
    columns, real, ranks = shape
    generator = torch.Generator().manual_seed(columns)
    whole = (torch.randn(ROWS, columns, generator=generator) * spread).to(dtype)
    whole[2, real - 1] = 2 * whole.abs().max()  # a peak in the last block
    labels = torch.randint(0, real, (ROWS,), generator=generator)
    labels[[0, 1, 4]] = torch.tensor([0, real - 1, -1])
    exact = whole[:, :real].double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels, reduction="none", ignore_index=-1)
    expected.sum().backward()

    parts = [part.contiguous() for part in whole.chunk(ranks, dim=1)]
    width = columns // ranks
    places = [(rank * width, min(max(real - rank * width, 0), width)) for rank in range(ranks)]
    every = torch.stack(
        [statistics(part, labels, *place) for part, place in zip(parts, places, strict=True)]
    )
    peak = every[:, 0].amax(dim=0)
    total = (every[:, 1] * (every[:, 0] - peak).exp()).sum(dim=0)
    losses = torch.where(labels < 0, 0.0, peak + total.log() - every[:, 2].sum(dim=0))
    for part, place, mine in zip(parts, places, every, strict=True):
        share = torch.where(labels < 0, 0.0, (mine[0] - peak).exp() / total)
        gradient_(part, labels, *place, mine[0], share)
    found = torch.cat(parts, dim=1)
    assert exact.grad is not None
    return (
        far(losses, expected.detach(), TOLERANCES[torch.float32])
        or far(found[:, :real], exact.grad, TOLERANCES[dtype])
        or bool(found[:, real:].any() or found[4].any())
    )


def far(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return not float((found.double() - expected).norm()) <= tolerance * float(expected.norm())


if __name__ == "__main__":
    cases = itertools.product(SHAPES, SPREADS, TOLERANCES)
    print("wrong:", [case for case in cases if is_wrong(*case)])
