"""Micro-batch -> model -> summed loss: Megatron-Core's forward_step contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from megatron_ettin.model.linear_cross_entropy import SummedLoss
from megatron_ettin.training.micro_batch import MicroBatch

LossFunction = Callable[[SummedLoss], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


def forward_step(
    batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[torch.Tensor | SummedLoss, LossFunction]:
    """Run the next micro-batch; return the stage's output and the function that sums its loss."""
    batch = next(batches)
    batch.wait()
    output = model(
        tokens=batch.tokens, packed=batch.packed, scored=batch.scored, labels=batch.labels
    )
    return output, partial(_summed_loss, batch)


def _summed_loss(
    batch: MicroBatch, loss: SummedLoss
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return (sum of the loss, scored positions, report) for losses [n] at the scored slots.

    Megatron-Core sums over micro-batches and ranks and divides gradients by the total, so the loss
    is the mean over all scored tokens of the global batch. The report holds g, sums and counts by
    row [m].
    """
    # The rows lie one after the other, and what only fills up lies behind them. Not index_add_:
    # on a GPU its order of summation differs from run to run. Checks would wait for the device.
    sums = torch.segment_reduce(loss.by_position.double(), "sum", lengths=batch.counts, unsafe=True)
    report = {"g": batch.packed.g, "loss_sums": sums, "counts": batch.counts}
    return loss.total, batch.total, report
