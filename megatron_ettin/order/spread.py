"""Middle and spread of losses, of which some are far from the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Standard deviation of a normal distribution, in median absolute deviations.
DEVIATIONS = 1.4826


def middle_and_spread(losses: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """Return the median of n > 0 losses, and their robust standard deviation.

    The spread is 0 if more than half of them are equal.
    """
    middle = float(np.median(losses))
    return middle, DEVIATIONS * float(np.median(np.abs(np.asarray(losses) - middle)))
