"""Faults of training and of the model, and what a call does that has one.

A fault changes what one function does, as a mistake in it would: a collective that is left out, run
twice, scaled or run in another group; a rank that takes another's share or forgets its place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from megatron_ettin import distributed

Effect = Callable[..., Any]
"""What a call does instead; it gets the function that was called, then the arguments."""


@dataclass(frozen=True)
class Fault:
    """A mistake in the function `name` of `owner`, in the layout where it does harm."""

    layout: str
    what: str
    owner: Any
    name: str
    effect: Effect
    caller: str | None = None
    """Qualified name of the function whose calls go wrong; None: all calls do."""

    def plant(self, patch: pytest.MonkeyPatch, reached: list[str]) -> None:
        """Put it in; each call that it changes adds to `reached`."""
        original = getattr(self.owner, self.name)

        def faulty(*args: Any, **kwargs: Any) -> Any:
            if self.caller not in (None, sys._getframe(1).f_code.co_qualname):
                return original(*args, **kwargs)
            reached.append(self.what)
            return self.effect(original, *args, **kwargs)

        patch.setattr(self.owner, self.name, faulty)


class Done:
    """Handle of a collective that has ended."""

    def wait(self) -> None:
        """Return at once."""


def leave_out(_: Effect, *args: Any, **kwargs: Any) -> Done:
    """Do nothing, where a collective works in place."""
    return Done()


def twice(collective: Effect, tensor: torch.Tensor, **kwargs: Any) -> Done:
    """Run a collective that works in place on its own result, too."""
    for _ in range(2):
        collective(tensor, **{**kwargs, "async_op": False})
    return Done()


def halved(collective: Effect, tensor: torch.Tensor, **kwargs: Any) -> Any:
    """Take the mean of two ranks where the sum is due."""
    tensor.div_(2)
    return collective(tensor, **kwargs)


def in_group(group: Callable[[], ProcessGroup]) -> Effect:
    """Return the effect of running a collective in another group."""
    return lambda original, *args, **kwargs: original(*args, **{**kwargs, "group": group()})


def own_copies(_: Effect, gathered: torch.Tensor, mine: torch.Tensor, **kwargs: Any) -> Done:
    """Gather copies of this rank's part instead of the others' parts."""
    gathered.copy_(torch.cat([mine] * (len(gathered) // len(mine))))
    return Done()


def own_addend(
    _: Effect, part: torch.Tensor, whole: torch.Tensor, *, group: ProcessGroup, **kwargs: Any
) -> Done:
    """Scatter without the sum: keep this rank's part of its own addend."""
    part.copy_(whole.chunk(group.size())[group.rank()])
    return Done()


def first_share(_: Effect, x: torch.Tensor, *, group: ProcessGroup) -> torch.Tensor:
    """Scatter the first share to every rank."""
    return x.chunk(group.size())[0].contiguous()


def with_arguments(**changed: Any) -> Effect:
    """Return the effect of other keyword arguments."""
    return lambda original, *args, **kwargs: original(*args, **{**kwargs, **changed})


def instead(value: Any) -> Effect:
    """Return the effect of always returning a value."""
    return lambda *_, **__: value


def changed(change: Callable[[Any], Any]) -> Effect:
    """Return the effect of changing what the call returns."""
    return lambda original, *args, **kwargs: change(original(*args, **kwargs))


def exchange_nothing(_: Effect, group: ProcessGroup, x: torch.Tensor) -> torch.Tensor:
    """Keep what an all-to-all would send."""
    return x


def alone(original: Effect, mine: torch.Tensor, labels: torch.Tensor, group: Any) -> Any:
    """Normalise the softmax over this rank's columns."""
    return original(mine, labels, SimpleNamespace(size=lambda: 1))


def neighbours_share(_: Effect, slots: int) -> slice:
    """Return the share of the next context-parallel rank."""
    rank, size = distributed.context_parallel()
    begin = (rank + 1) % size * (slots // size)
    return slice(begin, begin + slots // size)


def positions_of_first(original: Effect, batch: Any, *, slots: slice, **kwargs: Any) -> Any:
    """Give every context-parallel rank the positions of the first one's slots."""
    made = original(batch, slots=slots, **kwargs)
    positions = torch.from_numpy(batch.rows.position_ids[: slots.stop - slots.start].copy())
    return replace(made, packed=replace(made.packed, position_ids=positions))


def labels_of_first(original: Effect, batch: Any, *, slots: slice, **kwargs: Any) -> Any:
    """Read labels as if this rank's slots were the first of the stream."""
    made = original(batch, slots=slots, **kwargs)
    labels = torch.from_numpy(batch.labels[made.scored.numpy()].copy())
    return replace(made, labels=labels.clamp(min=0))


def dropout_at(place: Callable[[int, int], tuple[int, int]]) -> Effect:
    """Return the effect of drawing for another (layer, first slot)."""

    def draw(original: Effect, g: Any, *, layer: int, first_slot: int, **kwargs: Any) -> Any:
        layer, first_slot = place(layer, first_slot)
        return original(g, layer=layer, first_slot=first_slot, **kwargs)

    return draw


def dropout_by_place(original: Effect, g: Any, **kwargs: Any) -> Any:
    """Draw by the row's place in its micro-batch."""
    return original(np.arange(len(g)), **kwargs)


def wider_on_last(original: Effect, *args: Any) -> tuple[int, int] | None:
    """Let the last tensor-parallel rank see a key too many on each side."""
    window: tuple[int, int] | None = original(*args)
    if window is None or distributed.tensor_parallel_rank() == 0:
        return window
    return window[0] + 1, window[1] + 1


def no_borders_on_last(original: Effect, packed: Any, *args: int) -> Any:
    """Let documents see each other inside the window, on the last context-parallel rank."""
    if distributed.context_parallel()[0] == 0:
        return original(packed, *args)
    one = replace(packed, cu_seqlens_q=packed.cu_seqlens_q[[0, -1]], masks={})
    return original(one, *args)


def plain_shard(_: Effect, whole: torch.Tensor, parameter: Any, rank: int, size: int) -> Any:
    """Divide the gated MLP's matrix as if it were not two halves."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    return whole.chunk(size, dim=parameter.partition_dim)[rank]


def rotation_by_place(
    original: Effect, layer: Any, *args: Any, rotary_pos_emb: torch.Tensor, **kwargs: Any
) -> Any:
    """Choose the rotation by the place of the layer in its stage."""
    tables = rotary_pos_emb[[layer.config.window_attn_skip_freq[0]] * 2]
    return original(layer, *args, rotary_pos_emb=tables, **kwargs)


def marked(is_marked: bool) -> Effect:
    """Return the effect of a norm whose weight is, or is not, marked as sequence-parallel."""

    def build(original: Effect, norm: Any, *args: Any, **kwargs: Any) -> None:
        original(norm, *args, **kwargs)
        norm.weight.sequence_parallel = is_marked

    return build


def shifted_vocabulary(original: Effect, embedding: Any, tokens: torch.Tensor) -> Any:
    """Look tokens up a row too early, but on the first tensor-parallel rank."""
    return original(embedding, tokens - int(distributed.tensor_parallel_rank() > 0))


def data_ranks() -> ProcessGroup:
    """Return the data-parallel ranks, without the context-parallel ones."""
    group: ProcessGroup = parallel_state.get_data_parallel_group()
    return group
