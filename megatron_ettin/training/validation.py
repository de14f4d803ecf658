"""Held-out loss on a fixed set of rows, through the same forward pass as training."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ettin import distributed
from megatron_ettin.data.loader import Loader
from megatron_ettin.training.micro_batch import forward_step
from megatron_ettin.training.preparation import micro_batches, prefetch


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """Mean loss per token, its standard error over rows, and the tokens that it is a mean over."""

    loss: float
    standard_error: float
    scored_tokens: int


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A fixed set of rows: the first `num_rows` of an order over the held-out corpora."""

    loader: Loader
    num_rows: int

    def measure(self, ddp: DistributedDataParallel, phase: str) -> HeldOutLoss:
        """Measure the loss of the objective of `phase`; all ranks call this and get the same."""
        ddp.eval()
        objective = self.loader.objective.for_phase(phase)
        loader = dataclasses.replace(self.loader, objective=objective)
        batches = micro_batches(loader, 0, self.num_rows)
        with torch.no_grad(), prefetch(batches) as prepared:
            reports = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=prepared,
                model=ddp,
                num_microbatches=self.loader.num_micro_batches(0, self.num_rows),
                seq_length=self.loader.micro_batch_slots(0),
                micro_batch_size=1,
                forward_only=True,
            )
        ddp.train()
        rows = torch.zeros(self.num_rows, 2, dtype=torch.float64, device=distributed.device())
        if distributed.counts_losses():
            for report in reports:
                used = report["g"] >= 0
                rows[report["g"][used], 0] = report["loss_sums"][used]
                rows[report["g"][used], 1] = report["counts"][used].double()
        return mean_over_rows(distributed.all_reduce_sum(rows).cpu())


def mean_over_rows(rows: torch.Tensor) -> HeldOutLoss:
    """Return the ratio of sums and its standard error; rows [n, 2] are (loss sum, tokens).

    Rows have different numbers of tokens, so the error is that of a ratio estimator: from the
    residuals of each row's loss sum to mean * tokens.
    """
    sums, counts = rows.unbind(dim=1)
    total = counts.sum()
    mean = sums.sum() / total
    residuals = sums - mean * counts
    n = len(rows)
    spread = residuals.square().sum() * n / max(n - 1, 1)
    return HeldOutLoss(
        loss=float(mean),
        standard_error=math.sqrt(float(spread)) / float(total),
        scored_tokens=int(total),
    )
