"""A fault that rows bring: while their micro-batch passes the model, one weight is another."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from megatron_ettin import distributed
from megatron_ettin.training import loop, micro_batch
from megatron_ettin.training.micro_batch import MicroBatch
from tests.ranks import pretrain_main

Factors = Mapping[int, float]
"""Factor by row g: NaN makes loss and gradients NaN, a large one makes the loss a spike."""


def poisoned_step(factors: Factors) -> Callable[..., Any]:
    """Return a forward step that multiplies the last norm of the model where a row asks for it."""
    return partial(_forward_step, factors)


def _forward_step(
    factors: Factors, batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[Any, Any]:
    batch = next(batches)
    found = [factors[g] for g in batch.packed.g.tolist() if g in factors]
    norm = [weight for name, weight in model.named_parameters() if "norm" in name][-1]
    kept = norm.detach().clone()
    if found and distributed.is_last_stage():
        norm.data.mul_(found[0])
    try:
        return micro_batch.forward_step(iter([batch]), model)
    finally:
        norm.data.copy_(kept)


def poisoned_main(arguments: list[str], factors: Factors) -> None:
    """Run pretrain's command line with the fault, as the program of a rank."""
    loop.forward_step = poisoned_step(factors)
    pretrain_main(arguments)
