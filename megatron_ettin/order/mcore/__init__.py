"""The order of runs that Megatron-LM trained, read from the index caches it left."""

from megatron_ettin.order.mcore.run import FORMAT, McoreRun
from megatron_ettin.order.mcore.sample_order import McoreOrder

__all__ = ["FORMAT", "McoreOrder", "McoreRun"]
