"""The global sample order: what row g is, and which tokens it holds."""

from megatron_ettin.order.digest import mask_digest, token_digest
from megatron_ettin.order.sample_order import SampleOrder
from megatron_ettin.order.spec import OrderSpec, PhaseSpec, PoolSpec

__all__ = ["OrderSpec", "PhaseSpec", "PoolSpec", "SampleOrder", "mask_digest", "token_digest"]
