"""Causal language modelling, the decoders' objective: predict the next token from the left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, assert_never

import numpy as np

from megatron_ettin.objectives.base import Attention, Batch, Objective, next_tokens
from megatron_ettin.rows import CUT_PIECE, PADDING, Rows, TokenIds


@dataclass(frozen=True, kw_only=True)
class CausalLM(Objective):
    """Next-token prediction inside each piece; no prediction crosses a segment boundary."""

    attention: ClassVar[Attention] = "causal"
    measures_text: ClassVar[bool] = True

    def make_batch(self, rows: Rows, *, phase: str, mask_seed: int, ids: TokenIds) -> Batch:
        """Shift by one inside segments; do not score a [SEP] that ends no document."""
        lengths = np.diff(rows.cu_seqlens)
        loss_mask = np.repeat(rows.segment_kind != PADDING, lengths)
        # The last slot of a segment has no next token of its own. Empty segments have no last slot:
        # without the condition they would hit the end of the segment before.
        ends = rows.cu_seqlens[1:][lengths > 0] - 1
        loss_mask[ends] = False
        match rows.specials:
            case "add":
                # A cut piece reads [CLS] x [SEP], but its document goes on: the slot before the
                # [SEP] must not learn that the document ends there.
                cut_ends = rows.cu_seqlens[1:][rows.segment_kind == CUT_PIECE] - 2
                loss_mask[cut_ends] = False
            case "present":
                pass
            case _:
                assert_never(rows.specials)
        labels = next_tokens(rows, ids.pad)
        return Batch(
            rows=rows,
            tokens=rows.tokens,
            labels=labels,
            loss_mask=loss_mask,
            prediction_distance=1,
        )
