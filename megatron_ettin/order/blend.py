"""Blends: from the weights of a phase's sources to whole numbers of rows per period."""

from collections.abc import Sequence

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
