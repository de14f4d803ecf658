"""The interface of an order, which `SampleOrder` and `McoreOrder` implement.

The first half of the Protocol answers for both. The second half needs the rule by which the rows
were drawn. A run of Megatron-LM keeps only the outcome, so there those methods raise
NotRecordedError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from megatron_ettin import native
    from megatron_ettin.order.pieces import Pieces
    from megatron_ettin.order.spec import OrderSpec, PoolSpec
    from megatron_ettin.rows import Rows, TokenIds


class NotRecordedError(ValueError):
    """A question asks for something that a run of Megatron-LM does not record."""

    def __init__(self, place: object, what: str, remedy: str = "") -> None:
        """Name the run's folder or file, a plural noun for what it lacks, and a remedy if any."""
        super().__init__(
            f"{place}: a run of Megatron; its {what} are not recorded"
            + (f"; {remedy}" if remedy else "")
        )


@dataclass(frozen=True, kw_only=True)
class OrderPhase:
    """Rows [start_g, end_g) of one length, drawn by one rule."""

    name: str
    """Name in the configuration; empty for a run of Megatron-LM, which has one phase."""
    start_g: int
    end_g: int
    seq_length: int
    """Slots of a row; McoreOrder's rows hold one token more, the last label."""
    phase_id: str | None
    """Chained id (`OrderSpec.phase_ids`); None where no rule is recorded."""


class Order(Protocol):
    """Rows by number g: which tokens of which documents each one holds."""

    @property
    def format(self) -> str:
        """Name of the format that describes the order: "order/1" or "mcore"."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows of all phases."""
        ...

    @property
    def phases(self) -> Sequence[OrderPhase]:
        """Phases in the order of their rows, without gaps."""
        ...

    @property
    def source_names(self) -> list[str]:
        """Names of the sources; `Pieces.source` counts in this list."""
        ...

    @property
    def vocab_size(self) -> int:
        """Upper bound of the token ids: all of them are below it."""
        ...

    def phase_at(self, g: int) -> OrderPhase:
        """Return the phase of row `g`; ValueError if the order has no such row."""
        ...

    def seq_length(self, g: int) -> int:
        """Return the slots of row `g`."""
        ...

    def prefixes(self, source: str) -> list[str]:
        """Return the path of each shard of a source's corpus, without suffix."""
        ...

    def corpus(self, source: str) -> native.TokenCorpus:
        """Return a source's corpus."""
        ...

    def content_id(self, source: str) -> str:
        """Return an identity of a source's tokens: equal ones mean equal tokens."""
        ...

    def shortest_document(self, source: str) -> int:
        """Return the tokens that a document of a source needs to be drawn at all, at least 1."""
        ...

    def pieces(self, begin: int, end: int) -> Pieces:
        """Return which tokens of which documents make up the rows [begin, end)."""
        ...

    def tokens(self, begin: int, end: int) -> list[NDArray[np.int64]]:
        """Return the unmasked tokens of each of the rows [begin, end), padding left out."""
        ...

    def row_tokens(self, begin: int, end: int) -> NDArray[np.int64]:
        """Return the number of tokens of each of the rows [begin, end), without reading them."""
        ...

    def where(self, source: str, document: int) -> NDArray[np.int64]:
        """Return every row, ascending, that holds a part of a document; IndexError if none such."""
        ...

    def drawn_before(self, g: int) -> Iterator[tuple[PoolSpec, int]]:
        """Yield the pools begun before row g with their rows drawn by then; none if no rule."""
        ...

    # From here on an order without a recorded rule raises NotRecordedError.

    @property
    def spec(self) -> OrderSpec:
        """Rule of the order, as `order.json` holds it."""
        ...

    @property
    def ids(self) -> TokenIds:
        """Special token ids, and the size of the vocabulary."""
        ...

    def rows(self, phase_index: int, g: NDArray[np.int64]) -> Rows:
        """Return the rows `g` [m] of one phase as a model is fed; `-1` marks an idle row."""
        ...

    def plans(self, phase_index: int) -> Iterator[tuple[PoolSpec, native.RowPlan]]:
        """Yield the pools of a phase with their row plans."""
        ...

    def plan_paths(self) -> set[Path]:
        """Return the files of all plans."""
        ...

    def order_digests(self, begin: int, end: int) -> NDArray[np.uint64]:
        """Return [m, 2]: the order digest of each of the rows [begin, end), low lane first."""
        ...

    def order_digests_of(self, phase_index: int, g: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return [m, 2]: the order digests of the rows `g` [m] of one phase, 0 where idle."""
        ...

    def digested_tokens(
        self, begin: int, end: int
    ) -> tuple[list[NDArray[np.int64]], NDArray[np.uint64]]:
        """Return the tokens of the rows [begin, end), and [m, 2] the digest of those tokens."""
        ...
