"""The global sample order: the source, the documents and the tokens of each row g."""

from typing import TYPE_CHECKING, Any

from megatron_ettin.order.digest import mask_digest, token_digest
from megatron_ettin.order.order import NotRecordedError, Order, OrderPhase
from megatron_ettin.order.spec import OrderSpec, PhaseSpec, PoolSpec

if TYPE_CHECKING:
    from megatron_ettin.order.sample_order import SampleOrder

__all__ = [
    "NotRecordedError",
    "Order",
    "OrderPhase",
    "OrderSpec",
    "PhaseSpec",
    "PoolSpec",
    "SampleOrder",
    "mask_digest",
    "token_digest",
]


def __getattr__(name: str) -> Any:
    # SampleOrder imports the configuration parser. That takes longer than a question about a ledger
    # takes to answer, so it is imported when it is first used.
    if name == "SampleOrder":
        from megatron_ettin.order.sample_order import SampleOrder

        return SampleOrder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
