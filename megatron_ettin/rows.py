"""Rows of tokens as the order assembles them, before any objective looks at them. Only numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Specials = Literal["add", "present"]
"""Origin of [CLS] and [SEP]: added around each piece, or present in the corpus."""

#: Segment kinds of a packed row, as `native.assemble_rows` writes them.
PADDING, CUT_PIECE, LAST_PIECE = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """The token ids an objective needs, from the run's tokenizer."""

    vocab_size: int
    """Number of token ids, without padding; random replacements are drawn below it."""
    unk: int
    cls: int
    sep: int
    pad: int
    mask: int

    @property
    def special(self) -> tuple[int, ...]:
        """Ids that are never masked."""
        return (self.unk, self.cls, self.sep, self.pad, self.mask)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The m rows of a micro-batch, end to end: m * seq_length slots.

    A row is `seq_length` slots: pieces in ascending document order, then one padding segment, then
    empty segments up to `max_segments_per_row + 1`, so that all shapes are constant.
    """

    g: NDArray[np.int64]
    """[m] global row numbers; -1 for an idle row, which is padding only."""
    tokens: NDArray[np.int64]
    """[m * seq_length] token ids; row i holds slots [i * seq_length, (i + 1) * seq_length)."""
    position_ids: NDArray[np.int64]
    """[m * seq_length], restarting at 0 in every segment."""
    cu_seqlens: NDArray[np.int32]
    """[m * (max_segments_per_row + 1) + 1] segment boundaries in the stream, ascending from 0."""
    segment_kind: NDArray[np.uint8]
    """[m * (max_segments_per_row + 1)]: PADDING (or empty), CUT_PIECE or LAST_PIECE."""
    num_tokens: NDArray[np.int64]
    """[m] tokens before the padding, special tokens counted."""
    seq_length: int
    specials: Specials
    """ "add" if packing framed the pieces as [CLS] x [SEP]."""
