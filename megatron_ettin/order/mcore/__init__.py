"""The order of runs that Megatron-LM trained, read from the index caches it left."""

from megatron_ettin.order.mcore.run import McoreRun
from megatron_ettin.order.mcore.sample_order import McoreOrder

__all__ = ["McoreOrder", "McoreRun"]
