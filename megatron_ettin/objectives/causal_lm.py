"""Causal language modelling: predict the next token from the left (the decoders)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.objectives.base import Batch, Objective, next_tokens
from megatron_ettin.rows import CUT_PIECE, PADDING, Rows, TokenIds


@dataclass(frozen=True, kw_only=True)
class CausalLM(Objective):
    """Next-token prediction inside each piece; no prediction crosses a segment border."""

    attention: ClassVar[Literal["bidirectional", "causal"]] = "causal"

    def make_batch(self, rows: Rows, *, phase: str, mask_seed: int, ids: TokenIds) -> Batch:
        """Shift inside segments; a [SEP] after a *cut* piece ends no document: not scored."""
        lengths = np.diff(rows.cu_seqlens)
        loss_mask = np.repeat(rows.segment_kind != PADDING, lengths)
        ends = rows.cu_seqlens[1:][lengths > 0] - 1
        loss_mask[ends] = False
        if rows.specials == "add":
            cut_ends = rows.cu_seqlens[1:][rows.segment_kind == CUT_PIECE] - 2
            loss_mask[cut_ends] = False
        labels = next_tokens(rows, ids.pad)
        return Batch(rows=rows, tokens=rows.tokens, labels=labels, loss_mask=loss_mask)

    def original_tokens(self, batch: Batch) -> NDArray[np.int64]:
        """Return the inputs: nothing was masked."""
        return batch.tokens
