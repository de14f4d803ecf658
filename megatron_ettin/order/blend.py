"""Blends: from the weights of a phase's sources to whole numbers of rows per period."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_ettin import native

BLEND_PERIOD = 65_536
"""Rows after which a blend repeats its pattern of sources."""


def blend_quotas(weights: Sequence[float], period: int = BLEND_PERIOD) -> list[int]:
    """Round weights to integer quotas that sum to the period, by largest remainder.

    Exact rational arithmetic; equal remainders go to the lower index. Raises ValueError naming the
    weight that is not a finite number > 0 or whose share is below 1 / period.
    """
    # `fractions` imports `decimal`, which takes longer than a question about a ledger.
    from fractions import Fraction

    if not weights:
        raise ValueError("a blend needs at least one weight")
    for i, weight in enumerate(weights):
        if not 0 < weight < float("inf"):
            raise ValueError(f"weights[{i}] is {weight}; a weight must be a finite number > 0")
    exact = [Fraction(weight) for weight in weights]
    shares = [weight / sum(exact) * period for weight in exact]
    for i, share in enumerate(shares):
        if share < 1:
            raise ValueError(
                f"weights[{i}] = {weights[i]} is {float(share / period):.3g} of the blend, less "
                f"than the smallest share 1/{period}; raise it or drop the source"
            )
    # Largest remainder: round down, then give what is left to the largest fractions.
    quotas = [share.numerator // share.denominator for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (quotas[i] - shares[i], i))
    for i in by_remainder[: period - sum(quotas)]:
        quotas[i] += 1
    return quotas


def sources_of_rows(quotas: Sequence[int], rows: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the index of the source of each of a phase's rows [n], counted from 0."""
    pattern = _pattern(tuple(quotas))
    return pattern[rows % len(pattern)]


def rows_by_source(quotas: Sequence[int], begin: int, end: int) -> NDArray[np.int64]:
    """Return how many of a phase's rows [begin, end), counted from 0, each source has."""
    pattern = _pattern(tuple(quotas))

    def before(row: int) -> NDArray[np.int64]:
        periods, rest = divmod(row, len(pattern))
        rows = np.bincount(pattern[:rest], minlength=len(quotas))
        return periods * np.array(quotas, dtype=np.int64) + rows

    return before(end) - before(begin)


# A pass over the rows of a run asks for it ten thousand times, and it takes longer than a chunk.
@lru_cache(maxsize=16)
def _pattern(quotas: tuple[int, ...]) -> NDArray[np.int32]:
    """Return the index of the source of each row of a period."""
    pattern, _ = native.blend_table(list(quotas))
    pattern.flags.writeable = False
    return pattern
