"""The contract between the sample order, the objectives and the model: rows in, a scored batch out.

Everything here is numpy and a pure function of (seed, g); no file is read and no state is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

Specials = Literal["add", "present"]

#: Segment kinds of a packed row, as `native.assemble_rows` writes them.
PADDING, CUT_PIECE, LAST_PIECE = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """The token ids an objective needs, from the run's tokenizer."""

    vocab_size: int
    """Number of real token ids; random replacements are drawn below it."""
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
    """m consecutive slots of a micro-batch, before any objective has looked at them.

    A row is `seq_length` slots: pieces in ascending document order, then one padding segment, then
    empty segments up to `max_segments_per_row + 1`, so that all shapes are constant.
    """

    g: NDArray[np.int64]
    """[m] global row index; -1 for an idle row, which is padding only."""
    tokens: NDArray[np.int64]
    """[m * seq_length]"""
    position_ids: NDArray[np.int64]
    """[m * seq_length], restarting at 0 in every segment."""
    cu_seqlens: NDArray[np.int32]
    """[m * (max_segments_per_row + 1) + 1], segment borders in the stream of m * seq_length."""
    segment_kind: NDArray[np.uint8]
    """[m * (max_segments_per_row + 1)]: PADDING (or empty), CUT_PIECE or LAST_PIECE."""
    num_tokens: NDArray[np.int64]
    """[m] tokens before the padding, special tokens counted."""
    seq_length: int
    specials: Specials
    """Whether the rows' pieces were framed as [CLS] x [SEP] on the way ("add")."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch as a packed stream of t = m * seq_length slots: what a model consumes."""

    rows: Rows
    tokens: NDArray[np.int64]
    """[t] input ids, masked where the objective masks."""
    labels: NDArray[np.int64]
    """[t] the token predicted *from hidden state p*; read only where `loss_mask` is set."""
    loss_mask: NDArray[np.bool_]
    """[t] the scored positions."""


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """What is predicted (`make_batch`) and how positions attend to each other (`attention`).

    A subclass is at once the `objective` section of a run's YAML and the behaviour.
    """

    attention: ClassVar[Literal["bidirectional", "causal"]]
    prediction_shift: ClassVar[int] = 0
    """How many positions before a [MASK] its prediction is read, in a model that fills masks."""

    @abstractmethod
    def make_batch(self, rows: Rows, *, phase: str, mask_seed: int, ids: TokenIds) -> Batch:
        """Return inputs, labels and scored positions: a function of (rows, mask_seed) only."""

    @abstractmethod
    def original_tokens(self, batch: Batch) -> NDArray[np.int64]:
        """Rebuild the unmasked tokens [t] from the batch that was consumed (for the digest)."""

    def scored_share(self, phase: str) -> float:
        """Return the share of a row's slots that are scored in `phase`, at most."""
        return 1.0


def next_tokens(rows: Rows, last: int) -> NDArray[np.int64]:
    """Return [t] the token after each slot of the stream; `last` after the last one.

    Segments are not looked at: which of these are predicted is for a loss mask to say.
    """
    return np.append(rows.tokens[1:], last)
