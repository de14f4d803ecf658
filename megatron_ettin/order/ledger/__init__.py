"""The ledger: a chained record of the rows of every optimizer step (docs/ledger.md)."""

from typing import TYPE_CHECKING, Any

from megatron_ettin.order.ledger.format import EMPTY, RECORD, Head, Kind, LedgerError
from megatron_ettin.order.ledger.reader import Checkpoint, Fork, Ledger, find_description

if TYPE_CHECKING:
    from megatron_ettin.order.ledger.writer import LedgerWriter

__all__ = [
    "EMPTY",
    "RECORD",
    "Checkpoint",
    "Fork",
    "Head",
    "Kind",
    "Ledger",
    "LedgerError",
    "LedgerWriter",
    "find_description",
]


def __getattr__(name: str) -> Any:
    # Readers do without logging, sockets and locks, which only the writer imports.
    if name == "LedgerWriter":
        from megatron_ettin.order.ledger.writer import LedgerWriter

        return LedgerWriter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
