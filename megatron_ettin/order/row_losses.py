"""Losses of a run's rows, 8 bytes each, in a file that is addressed by the row number g.

docs/ledger.md specifies the format (section 7). Values of a row that was left out, or of which
nothing is on record, are told apart from a loss by the state of its entry.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.native import find_losses_above, split_trained_losses
from megatron_ettin.order.ledger.format import FORKS_FOLDER

LOSSES_FILE = "row_losses.bin"
#: End of the name of a fork's file.
LOSSES_SUFFIX = ".losses"
#: First bytes of a file; the number of its first row follows, 8 bytes, little-endian.
MAGIC = b"rowloss1"
HEADER_BYTES = 16
#: Entry of a row. The two highest bits of `word` are its state, the others its tokens.
ENTRY = np.dtype([("loss_sum", "<f4"), ("word", "<u4")])
_STATE_SHIFT = 30
#: Entries that are read, written or hashed at a time.
CHUNK_ROWS = 1 << 20
#: More tokens than an entry can hold.
TOKENS_END = 1 << _STATE_SHIFT


class RowState(IntEnum):
    """State of an entry; a hole of a file is an entry of zeros, of which nothing is on record."""

    UNKNOWN = 0
    TRAINED = 1
    LEFT_OUT = 2


class RowLossError(ValueError):
    """A file of row losses is damaged, or ends too early; the message names it and the byte."""


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """Losses of n consecutive rows of a run."""

    sums: NDArray[np.float32]
    """[n] loss summed over the scored positions, with their weights; NaN if not trained on."""
    tokens: NDArray[np.uint32]
    """[n] tokens over which the sum is averaged; 0 if not trained on, or if nothing is scored."""
    states: NDArray[np.uint8]
    """[n] RowState."""
    all_scored: bool = False
    """True if all rows are known to have tokens, and so a sum: passes over a run need not look."""

    @property
    def means(self) -> NDArray[np.float64]:
        """Mean loss per token [n]; NaN where a row has none."""
        has_loss = self.tokens > 0
        means = np.full(len(self.sums), np.nan)
        np.divide(self.sums, self.tokens, out=means, where=has_loss, dtype=np.float64)
        return means


def trained_entries(sums: NDArray[np.float64], tokens: NDArray[np.float64]) -> NDArray[np.void]:
    """Return the entries [n] of rows that were trained on; `tokens` are whole numbers.

    Raises:
        ValueError: a row has more tokens than an entry can hold.
    """
    if len(tokens) and int(tokens.max()) >= TOKENS_END:
        raise ValueError(f"a row of {tokens.max()} tokens: an entry holds fewer than {TOKENS_END}")
    entries = np.empty(len(sums), dtype=ENTRY)
    entries["loss_sum"] = sums
    entries["word"] = tokens.astype(np.uint32) + np.uint32(RowState.TRAINED << _STATE_SHIFT)
    return entries


def left_out_entries(count: int) -> NDArray[np.void]:
    """Return the entries [count] of rows that were left out."""
    entries = np.empty(count, dtype=ENTRY)
    entries["loss_sum"] = np.nan
    entries["word"] = RowState.LEFT_OUT << _STATE_SHIFT
    return entries


def header(first_g: int) -> bytes:
    """Return the first HEADER_BYTES of a file whose first entry is that of row `first_g`."""
    return MAGIC + first_g.to_bytes(8, "little")


def read_first_row(path: Path, content: bytes) -> int:
    """Return the first row of a file that begins with `content`.

    Raises:
        RowLossError: it is no file of row losses.
    """
    if len(content) < HEADER_BYTES or not content.startswith(MAGIC):
        raise RowLossError(
            f"{path}: byte 0: not a file of row losses: restore it, or move it away to go on "
            f"without the losses of earlier rows"
        )
    return int.from_bytes(content[len(MAGIC) : HEADER_BYTES], "little")


def fork_losses(ledger: Path, fork: str) -> Path:
    """Return the file with the losses of the rows of a fork, by the fork's name."""
    return ledger / FORKS_FOLDER / f"{fork}{LOSSES_SUFFIX}"


class RowLossReader:
    """Reads a file of row losses, also while a run appends to it."""

    def __init__(self, path: Path, first_g: int, end_g: int) -> None:
        """Take a file with entries of rows [first_g, end_g)."""
        self.path = path
        self.first_g = first_g
        self.end_g = end_g

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a file.

        Raises:
            FileNotFoundError: there is none.
            RowLossError: it is no file of row losses.
        """
        with path.open("rb") as file:
            first = read_first_row(path, file.read(HEADER_BYTES))
            size = os.fstat(file.fileno()).st_size
        return cls(path, first, first + (size - HEADER_BYTES) // ENTRY.itemsize)

    def entries(self, begin: int, end: int) -> NDArray[np.void]:
        """Return the entries [n] of rows [begin, end) as they are; rows not in the file are zeros.

        Raises:
            RowLossError: the file has become shorter.
        """
        first, last = max(begin, self.first_g), min(end, self.end_g)
        is_whole = (first, last) == (begin, end)
        found = (np.empty if is_whole else np.zeros)(end - begin, dtype=ENTRY)
        if first >= last:
            return found
        offset = HEADER_BYTES + (first - self.first_g) * ENTRY.itemsize
        into = memoryview(found[first - begin : last - begin].view(np.uint8))  # type: ignore[arg-type]
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            have = 0
            while have < len(into) and (count := file.readinto(into[have:])):
                have += count
        if have < len(into):
            raise RowLossError(
                f"{self.path}: ends at byte {offset + have}, within the rows [{begin}, {end}): "
                f"restore it"
            )
        return found

    def read(self, begin: int, end: int) -> RowLosses:
        """Return the losses of rows [begin, end).

        Raises:
            RowLossError: an entry is none that a run writes; the message names its row and byte.
        """
        entries = self.entries(begin, end)
        # The rule: all rows were trained on, and have scored positions.
        sums, tokens, are_trained = split_trained_losses(entries.view("<u8"))
        if are_trained and len(entries):
            states = np.full(len(entries), RowState.TRAINED, dtype=np.uint8)
            return RowLosses(sums=sums, tokens=tokens, states=states, all_scored=True)
        words = entries["word"]
        sums = entries["loss_sum"].copy()
        tokens = words & np.uint32(TOKENS_END - 1)
        states = (words >> _STATE_SHIFT).astype(np.uint8)
        self._refuse(_contradictory(sums, tokens, states), begin)
        sums[states != RowState.TRAINED] = np.nan
        return RowLosses(sums=sums, tokens=tokens, states=states)

    def above(
        self, begin: int, end: int, limits: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the rows [k] of [begin, end) with a mean loss above their limit, and the means.

        They are compared with `limits` [end - begin] in float32. Raises as `read`.
        """
        entries = self.entries(begin, end)
        places, are_trained = find_losses_above(entries.view("<u8"), limits)
        if not are_trained:
            read = self.read(begin, end)
            is_above = read.sums > read.tokens.astype(np.float32) * limits
            places = np.flatnonzero(is_above & (read.tokens > 0))
        found = entries[places]
        tokens = found["word"] & np.uint32(TOKENS_END - 1)
        return begin + places, found["loss_sum"].astype(np.float64) / tokens

    def _refuse(self, is_wrong: NDArray[np.bool_], begin: int) -> None:
        if is_wrong.any():
            g = begin + int(np.argmax(is_wrong))
            byte = HEADER_BYTES + (g - self.first_g) * ENTRY.itemsize
            raise RowLossError(
                f"{self.path}: byte {byte}, row {g}: not what a run writes: restore the file; "
                f"`verify` says which stretch is damaged"
            )


def _contradictory(
    sums: NDArray[np.float32], tokens: NDArray[np.uint32], states: NDArray[np.uint8]
) -> NDArray[np.bool_]:
    """Return [n] True where an entry is none that a run writes."""
    trained, left_out = states == RowState.TRAINED, states == RowState.LEFT_OUT
    is_wrong = ~trained & (tokens > 0) | (states > RowState.LEFT_OUT)
    is_wrong |= trained & (~np.isfinite(sums) | (tokens == 0) & (sums != 0.0))
    is_wrong |= left_out & ~np.isnan(sums)
    is_wrong |= (states == RowState.UNKNOWN) & (sums != 0.0)
    return is_wrong
