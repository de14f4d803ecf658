"""Batches from rows: the rows of a data-parallel rank, as its objective makes batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from megatron_ettin.config import RunConfig
from megatron_ettin.objectives import Batch, Objective
from megatron_ettin.order import Order
from megatron_ettin.rows import TokenIds


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Batches of any step on any rank, computed from g: nothing is broadcast, no state kept."""

    order: Order
    objective: Objective
    ids: TokenIds
    mask_seed: int
    micro_batch_tokens: int
    """Largest number of slots of a micro-batch, which holds as many whole rows as fit."""
    data_parallel_rank: int
    data_parallel_size: int

    @classmethod
    def of_run(
        cls,
        config: RunConfig,
        order: Order,
        *,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
    ) -> Self:
        """Return the loader of a rank of a run, by default of the only one."""
        return cls(
            order=order,
            objective=config.objective,
            ids=order.ids,
            mask_seed=config.seeds.mask,
            micro_batch_tokens=config.hardware.micro_batch_tokens,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )

    def num_micro_batches(self, begin: int, end: int) -> int:
        """Return how many micro-batches each rank runs for rows [begin, end)."""
        per_micro_batch = self._micro_batch_rows(begin) * self.data_parallel_size
        return -(-(end - begin) // per_micro_batch)

    def micro_batch_slots(self, begin: int) -> int:
        """Return the slots of each micro-batch of the phase that row `begin` lies in."""
        phase = self.order.spec.phases[self.order.spec.phase_index(begin)]
        return self._micro_batch_rows(begin) * phase.seq_length

    def micro_batches(self, begin: int, end: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches of rows [begin, end), which lie in one phase.

        Micro-batch m of rank r takes rows begin + (m * DP + r) * micro_batch_rows onward. Rows from
        `end` on are idle (g = -1): padding that is not scored.
        """
        phase_index = self.order.spec.phase_index(begin)
        rows = self._micro_batch_rows(begin)
        for m in range(self.num_micro_batches(begin, end)):
            first = begin + (m * self.data_parallel_size + self.data_parallel_rank) * rows
            g = np.arange(first, first + rows, dtype=np.int64)
            g[g >= end] = -1
            yield self.objective.make_batch(
                self.order.rows(phase_index, g),
                phase=self.order.spec.phases[phase_index].name,
                mask_seed=self.mask_seed,
                ids=self.ids,
            )

    def _micro_batch_rows(self, g: int) -> int:
        phase = self.order.spec.phases[self.order.spec.phase_index(g)]
        return self.micro_batch_tokens // phase.seq_length
