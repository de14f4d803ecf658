"""Micro-batches of one number, with what Megatron-Core's schedule and our graphs ask of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_ettin.training.micro_batch import Report


@dataclass
class Number:
    """Micro-batch of one number."""

    value: torch.Tensor
    shapes: tuple[int, ...] = (1,)
    total: torch.Tensor = field(default_factory=lambda: torch.tensor(1, dtype=torch.int32))

    def wait(self) -> None:
        """Do nothing: it is there."""

    def clone(self) -> Number:
        return Number(self.value.clone())

    def copy_values(self, other: Number) -> None:
        self.value.copy_(other.value)


class Again:
    """A capture that replays by running the function again."""

    def __call__(self, function: Callable[[], Report]) -> Callable[[], Report]:
        return function

    def beside(self) -> AbstractContextManager[None]:
        return nullcontext()


def number_step(numbers: Iterator[Number], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """Run the model on the next number; its output is the loss."""
    number = next(numbers)
    return model(number.value), lambda loss: (loss, number.total, {"loss": loss.detach()})
