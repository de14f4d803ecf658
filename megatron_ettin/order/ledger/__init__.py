"""The ledger: what every optimizer step was fed, in chained records (docs/ledger.md)."""

from megatron_ettin.order.ledger.format import EMPTY, RECORD, Head, Kind, LedgerError
from megatron_ettin.order.ledger.reader import Checkpoint, Fork, Ledger
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
]
