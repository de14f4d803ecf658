"""The ledger: what every optimizer step was fed, in chained records (docs/ledger.md)."""

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
    # Who only reads does without logging, sockets and locks.
    if name == "LedgerWriter":
        from megatron_ettin.order.ledger.writer import LedgerWriter

        return LedgerWriter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
