"""Text from a masked diffusion model: masks that are filled in, some at each of several steps.

This file needs torch alone. It stands in the folder of every exported masked diffusion model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

import torch


class Unmasking:
    """Fills [MASK] tokens step by step; each step sees what those before it have filled in."""

    def __init__(
        self,
        logits: Callable[[torch.Tensor], torch.Tensor],
        *,
        mask_id: int,
        never: Collection[int] = (),
    ) -> None:
        """Take the model and the ids that it fills with.

        Args:
            logits: maps token ids [n, t] to logits [n, t, vocabulary].
            mask_id: the id to fill.
            never: ids that no mask becomes, such as other special tokens.
        """
        self._logits = logits
        self._mask_id = mask_id
        self._never = sorted({mask_id, *never})

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Unmasking:
        """Take a model and a tokenizer of transformers."""
        model.eval()

        def logits(tokens: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = model(input_ids=tokens).logits
            return found

        return cls(logits, mask_id=tokenizer.mask_token_id, never=tokenizer.all_special_ids)

    @torch.no_grad()
    def fill(
        self,
        tokens: torch.Tensor,
        *,
        steps: int,
        order: Literal["confidence", "random"] = "confidence",
        temperature: float = 1.0,
        seed: int = 0,
    ) -> torch.Tensor:
        """Return `tokens` [n, t] with every mask filled; all rows have the same length.

        Args:
            tokens: int64 ids, with special tokens and without padding.
            steps: passes through the model; each fills an equal share of a row's masks.
            order: which masks a step fills: those whose drawn token is likeliest, or any.
            temperature: divides the logits; 0 takes the likeliest token.
            seed: row i depends on (seed, i) and on its own tokens alone.
        """
        if steps < 1:
            raise ValueError(f"steps: {steps}; there must be one or more")
        tokens = tokens.clone()
        generators = [torch.Generator().manual_seed((seed << 20) + i) for i in range(len(tokens))]
        for left in range(steps, 0, -1):
            if not (tokens == self._mask_id).any():
                break
            logits = self._logits(tokens).float().cpu()
            logits[..., self._never] = float("-inf")
            for row, of_row, generator in zip(tokens, logits, generators, strict=True):
                self._fill_some(row, of_row, generator, left, order, temperature)
        return tokens

    def _fill_some(
        self,
        row: torch.Tensor,
        logits: torch.Tensor,
        generator: torch.Generator,
        left: int,
        order: str,
        temperature: float,
    ) -> None:
        """Fill one part in `left` of the masks of a row [t], in place."""
        masks = (row == self._mask_id).nonzero()[:, 0]
        if not len(masks):
            return
        chances = logits[masks.cpu()].div(temperature or 1.0).softmax(dim=-1)
        if temperature:
            drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
        else:
            drawn = chances.argmax(dim=-1)
        if order == "random":
            ranks = torch.rand(len(masks), generator=generator)
        else:
            ranks = chances.gather(1, drawn[:, None])[:, 0]
        chosen = ranks.topk(-(-len(masks) // left)).indices
        row[masks[chosen.to(row.device)]] = drawn[chosen].to(row.device)
