"""Batch -> model -> summed loss: Megatron-Core's forward_step contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from megatron_ettin import distributed
from megatron_ettin.model.attention import PackedRows
from megatron_ettin.objectives import Batch

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


def forward_step(
    batches: Iterator[Batch], model: torch.nn.Module
) -> tuple[torch.Tensor, LossFunction]:
    """Run the next micro-batch; return the stage's output and the function that sums its loss."""
    batch = next(batches)
    device = distributed.device()
    scored = torch.from_numpy(np.flatnonzero(batch.loss_mask)).to(device)
    labels = torch.from_numpy(batch.labels).to(device)
    output = model(
        tokens=torch.from_numpy(batch.tokens).to(device),
        packed=packed_rows(batch, device),
        scored=scored,
        labels=labels.index_select(0, scored),
    )
    return output, partial(_summed_loss, batch, scored)


def packed_rows(batch: Batch, device: torch.device) -> PackedRows:
    """Return the layout of a batch's stream on `device`."""
    rows = batch.rows
    return PackedRows.of(
        torch.from_numpy(rows.cu_seqlens).to(device),
        rows.seq_length,
        torch.from_numpy(rows.position_ids).to(device),
        torch.from_numpy(rows.g).to(device),
    )


def _summed_loss(
    batch: Batch, scored: torch.Tensor, loss: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return (sum of the loss, scored positions, report) for losses [n] at the scored slots.

    Megatron-Core sums over micro-batches and ranks and divides gradients by the total, so the loss
    is the mean over all scored tokens of the global batch. The report holds g, sums and
    counts by row [m]; copies, because the pipeline schedule scales the loss tensor in place.
    """
    row_of = scored // batch.rows.seq_length
    sums = torch.zeros(len(batch.rows.g), dtype=torch.float64, device=loss.device)
    sums.index_add_(0, row_of, loss.detach().double())
    counts = torch.bincount(row_of, minlength=len(sums))
    total = torch.tensor(len(scored), dtype=torch.int, device=loss.device)
    report = {
        "g": torch.from_numpy(batch.rows.g).to(loss.device),
        "loss_sums": sums,
        "counts": counts,
    }
    return loss.sum(), total, report
