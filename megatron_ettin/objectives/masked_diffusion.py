"""Masked diffusion: fill in any share of a text, with a loss that bounds its likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_ettin import native
from megatron_ettin.objectives.base import Attention, Batch, Objective
from megatron_ettin.rows import Rows, TokenIds

#: 2^64 / golden ratio. Multiples of it, modulo 2^64, fill the circle more evenly than any random
#: draws: n consecutive ones leave no gap wider than 1.9 / n of it.
GOLDEN_STEP = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class MaskedDiffusion(Objective):
    """Masked (absorbing) diffusion in continuous time, as in MDLM (arXiv 2406.07524) and LLaDA.

    Row g has a noise level t in (0, 1], and each token but the special ones becomes [MASK] with
    probability t. The loss of a masked token weighs 1 / t, and the sum is divided by all tokens but
    the special ones: an unbiased estimate of a bound of -log p(text), in nats per token.
    """

    attention: ClassVar[Attention] = "bidirectional"
    measures_text: ClassVar[bool] = True

    def make_batch(self, rows: Rows, *, phase: str, mask_seed: int, ids: TokenIds) -> Batch:
        """Mask each row at its own rate, by counters of (mask_seed, g, position)."""
        levels = noise_levels(rows.g, mask_seed)
        selected = np.empty(len(rows.tokens), dtype=np.bool_)
        for r, level in enumerate(levels.tolist()):
            slots = slice(r * rows.seq_length, (r + 1) * rows.seq_length)
            _, selected[slots] = native.mask_tokens(
                rows.tokens[slots],
                rows.g[r : r + 1],
                seq_length=rows.seq_length,
                mask_seed=mask_seed,
                mask_rate=level,
                mask_id=ids.mask,
                vocab_size=ids.vocab_size,
                special_ids=ids.special,
            )
        return Batch(
            rows=rows,
            tokens=np.where(selected, ids.mask, rows.tokens),
            labels=rows.tokens,
            loss_mask=selected,
            weights=np.repeat((1.0 / levels).astype(np.float32), rows.seq_length),
            counted=~np.isin(rows.tokens, ids.special),
        )

    def scored_share(self, phase: str) -> float:
        """Return the mean noise level."""
        return 0.5

    def largest_scored_share(self, phase: str) -> float:
        """Return 1: at the highest noise level a row is masked as a whole."""
        return 1.0


def noise_levels(g: NDArray[np.int64], mask_seed: int) -> NDArray[np.float64]:
    """Return the noise level of each row [m], in (0, 1]; consecutive rows cover it evenly.

    Each is a multiple of 2^-53, so that a token is masked with exactly this probability
    (docs/order.md, section 7).
    """
    key = native.counter_key(mask_seed, native.Purpose.NOISE, [])
    places = native.counter_draws(key, 0, 1) + g.astype(np.uint64) * GOLDEN_STEP
    return 1.0 - (places >> np.uint64(11)).astype(np.float64) * 2.0**-53
