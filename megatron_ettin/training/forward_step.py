"""Batch -> model -> summed loss: Megatron-Core's forward_step contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from megatron_ettin import distributed
from megatron_ettin.model.attention import PackedRows
from megatron_ettin.model.linear_cross_entropy import SummedLoss
from megatron_ettin.objectives import Batch

LossFunction = Callable[[SummedLoss], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


def forward_step(
    batches: Iterator[Batch], model: torch.nn.Module
) -> tuple[torch.Tensor | SummedLoss, LossFunction]:
    """Run the next micro-batch; return the stage's output and the function that sums its loss."""
    batch = next(batches)
    device = distributed.device()
    slots = local_slots(len(batch.tokens))
    scored = slots.start + np.flatnonzero(batch.loss_mask[slots])
    output = model(
        tokens=torch.from_numpy(batch.tokens[slots]).to(device),
        packed=packed_rows(batch, device),
        scored=torch.from_numpy(scored - slots.start).to(device),
        labels=torch.from_numpy(batch.labels[scored]).to(device),
    )
    return output, partial(_summed_loss, batch, scored)


def local_slots(slots: int) -> slice:
    """Return which of a stream's slots this context-parallel rank holds."""
    rank, size = distributed.context_parallel()
    return slice(rank * slots // size, (rank + 1) * slots // size)


def packed_rows(batch: Batch, device: torch.device) -> PackedRows:
    """Return the layout of a batch's stream on `device`, for this context-parallel rank."""
    rows = batch.rows
    slots = local_slots(len(rows.tokens))
    return PackedRows.of(
        torch.from_numpy(rows.cu_seqlens).to(device),
        rows.seq_length,
        torch.from_numpy(rows.position_ids[slots]).to(device),
        torch.from_numpy(rows.g).to(device),
        first_slot=slots.start,
    )


def _summed_loss(
    batch: Batch, scored: np.ndarray, loss: SummedLoss
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return (sum of the loss, scored positions, report) for losses [n] at the scored slots.

    Megatron-Core sums over micro-batches and ranks and divides gradients by the total, so the loss
    is the mean over all scored tokens of the global batch. The report holds g, sums and counts by
    row [m].
    """
    device = loss.total.device
    row_of = torch.from_numpy(scored // batch.rows.seq_length).to(device)
    sums = torch.zeros(len(batch.rows.g), dtype=torch.float64, device=device)
    sums.index_add_(0, row_of, loss.by_position.double())
    counts = torch.bincount(row_of, minlength=len(sums))
    total = torch.tensor(len(scored), dtype=torch.int, device=device)
    report = {"g": torch.from_numpy(batch.rows.g).to(device), "loss_sums": sums, "counts": counts}
    return loss.total, total, report
