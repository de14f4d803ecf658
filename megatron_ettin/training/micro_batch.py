"""Micro-batches on the device, in constant shapes, sent in one copy; and the forward step.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_ettin import distributed
from megatron_ettin.model.attention import MixedRows, PackedRows
from megatron_ettin.model.linear_cross_entropy import SummedLoss
from megatron_ettin.objectives import Attention, Batch
from megatron_ettin.training.device_copy import copy_to_device

#: GPUs get scored positions in multiples of this, whole tiles of their matmuls.
POSITIONS_MULTIPLE = 128
#: Label of a padded position, which is there for the constant shape alone.
NO_LABEL = -1

Report = dict[str, torch.Tensor]
"""Row numbers, loss sums and the tokens they are averaged over, each [m]; see `forward_step`."""
LossFunction = Callable[[SummedLoss], tuple[torch.Tensor, torch.Tensor, Report]]
ForwardBackward = Callable[..., list[Report]]
"""Runs a step's micro-batches, as Megatron-Core's `get_forward_backward_func()` does."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Input of one forward pass: this rank's t slots of a stream of m rows, n of them scored."""

    tokens: torch.Tensor
    """[t] int64 input ids."""
    packed: PackedRows
    """Segments, positions and row numbers of the stream."""
    scored: torch.Tensor
    """[n] int64 scored slots of these t, ascending; then for padded positions slots spread over all
    t, because one slot for all of them would have to sum their gradients (zeros) one by one."""
    labels: torch.Tensor
    """[n] int64 tokens to predict at `scored`; NO_LABEL for padded positions."""
    weights: torch.Tensor | None
    """[n] float32 factors of the losses at `scored`; None: 1 everywhere."""
    counts: torch.Tensor
    """[m] int64 scored positions of each row; padded positions count in none."""
    averaged: torch.Tensor
    """[m] int64 tokens of each row over which its loss is averaged; mostly `counts` itself."""
    total: torch.Tensor
    """[] int32 sum of `averaged`."""
    memory: torch.Tensor
    """[bytes] uint8 buffer that all other tensors are views of."""
    copied: torch.cuda.Event | None
    """Event at the end of the copy to the device; None on a CPU, which copies nothing."""

    def wait(self) -> None:
        """Make the current stream wait for the copy, but not the caller; call it before use."""
        if self.copied is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.copied)
            # Without this the allocator could give the memory to the next copy as soon as Python
            # drops the tensor, while this stream still reads it.
            self.memory.record_stream(stream)

    @property
    def shapes(self) -> tuple[int, ...]:
        """Lengths that a CUDA graph fixes: micro-batches with equal ones can share a graph."""
        tensors = (self.tokens, self.packed.cu_seqlens_q, self.scored, self.counts)
        packed, has_weights = self.packed, self.weights is not None
        parts = [n for slots, part in _parts(packed) for n in (len(slots), len(part.cu_seqlens_q))]
        is_causal = packed.attention == "causal"
        rest = (packed.max_seqlen_q, packed.first_slot, has_weights, is_causal)
        return (*map(len, tensors), *rest, *parts)

    def clone(self) -> MicroBatch:
        """Return a copy with memory of its own, on the same device."""
        memory = self.memory.clone()

        def view_of_copy(x: torch.Tensor) -> torch.Tensor:
            # The offset counts elements of x's own dtype, but the buffer is of bytes.
            begin = x.storage_offset() * x.element_size()
            return memory[begin : begin + x.nbytes].view(x.dtype).view(x.shape)

        def packed_copy(packed: PackedRows) -> PackedRows:
            mixed = packed.mixed
            if mixed is not None:
                parts = [(view_of_copy(slots), packed_copy(part)) for slots, part in mixed.parts]
                mixed = MixedRows(tuple(parts), view_of_copy(mixed.places))
            assert packed.position_ids is not None
            return PackedRows.of(
                view_of_copy(packed.cu_seqlens_q),
                packed.max_seqlen_q,
                view_of_copy(packed.position_ids),
                view_of_copy(packed.g),
                first_slot=packed.first_slot,
                attention=packed.attention,
                mixed=mixed,
            )

        return dataclasses.replace(
            self,
            tokens=view_of_copy(self.tokens),
            packed=packed_copy(self.packed),
            scored=view_of_copy(self.scored),
            labels=view_of_copy(self.labels),
            weights=None if self.weights is None else view_of_copy(self.weights),
            counts=view_of_copy(self.counts),
            averaged=view_of_copy(self.averaged),
            total=view_of_copy(self.total),
            memory=memory,
            copied=None,
        )

    def copy_values(self, other: MicroBatch) -> None:
        """Take the values of a micro-batch of the same shapes, once its copy has been waited for.

        A graph reads the same memory at each replay, so values come here in one copy.
        """
        self.memory.copy_(other.memory)
        for packed in (self.packed, *(part for _, part in _parts(self.packed))):
            packed.masks.clear()


def _parts(packed: PackedRows) -> tuple[tuple[torch.Tensor, PackedRows], ...]:
    return () if packed.mixed is None else packed.mixed.parts


def make_micro_batch(
    batch: Batch,
    *,
    slots: slice,
    capacity: int,
    stream: torch.cuda.Stream | None,
    for_graphs: bool = False,
) -> MicroBatch:
    """Prepare this rank's `slots` of a batch, with scored positions in multiples of `capacity`.

    They are copied to the GPU of `stream`; without one they stay on the CPU. `for_graphs`: take
    fewer shapes, since each one costs a capture (`segment_boundaries`).
    """
    boundaries = partial(segment_boundaries, powers_of_two=for_graphs)
    rows = batch.rows
    scored = np.flatnonzero(batch.loss_mask[slots])
    in_stream = slots.start + scored
    missing = padded_positions(len(scored), capacity) - len(scored)
    counts = _by_row(batch, in_stream)
    averaged = counts
    if batch.counted is not None:
        averaged = _by_row(batch, slots.start + np.flatnonzero(batch.counted[slots]))
    arrays: dict[str, NDArray[Any]] = {
        "tokens": batch.tokens[slots],
        "position_ids": rows.position_ids[slots],
        "cu_seqlens": boundaries(rows.cu_seqlens),
        "g": rows.g,
        "counts": counts,
        "total": np.array([averaged.sum()], dtype=np.int32),
        "scored": np.concatenate([scored, _spread(missing, slots.stop - slots.start)]),
        "labels": np.pad(batch.labels[in_stream], (0, missing), constant_values=NO_LABEL),
    }
    if batch.counted is not None:
        arrays["averaged"] = averaged
    if batch.weights is not None:
        arrays["weights"] = np.pad(batch.weights[in_stream], (0, missing))
    arrays |= _mixed_arrays(batch, boundaries)
    memory, there, copied = copy_to_device(arrays, stream)
    packed = _packed_rows(batch, there, first_slot=slots.start)
    return MicroBatch(
        tokens=there["tokens"],
        packed=packed,
        scored=there["scored"],
        labels=there["labels"],
        weights=there.get("weights"),
        counts=there["counts"],
        averaged=there.get("averaged", there["counts"]),
        total=there["total"][0],
        memory=memory,
        copied=copied,
    )


def _spread(count: int, slots: int) -> NDArray[np.int64]:
    """Return `count` of `slots` slots, as far apart as they can be."""
    return np.arange(count) * slots // max(count, 1)


def _mixed_arrays(
    batch: Batch, segments: Callable[[NDArray[np.int32]], NDArray[np.int32]]
) -> dict[str, NDArray[Any]]:
    """Return the rows of each direction as streams of their own; nothing if there is one only."""
    rows, is_causal = batch.rows, batch.is_causal
    if not isinstance(is_causal, np.ndarray) or is_causal.all() or not is_causal.any():
        return {}
    arrays: dict[str, NDArray[Any]] = {}
    slots = np.arange(len(rows.tokens)).reshape(len(rows.g), rows.seq_length)
    lengths = np.diff(rows.cu_seqlens).reshape(len(rows.g), -1)
    for attention, chosen in (("causal", is_causal), ("bidirectional", ~is_causal)):
        boundaries = np.cumsum([0, *lengths[chosen].ravel()], dtype=np.int32)
        arrays[f"{attention} slots"] = slots[chosen].ravel()
        arrays[f"{attention} cu_seqlens"] = segments(boundaries)
        arrays[f"{attention} g"] = rows.g[chosen]
    in_parts = np.concatenate([arrays["causal slots"], arrays["bidirectional slots"]])
    return {**arrays, "places": np.argsort(in_parts)}


def _packed_rows(batch: Batch, there: dict[str, torch.Tensor], *, first_slot: int) -> PackedRows:
    """Describe the stream from its arrays on the device, by name."""
    seq_length, positions = batch.rows.seq_length, there["position_ids"]
    attention: Attention | None = None
    mixed = None
    if "places" in there:
        kinds: tuple[Attention, ...] = ("causal", "bidirectional")
        parts = [
            (
                there[f"{kind} slots"],
                PackedRows.of(
                    there[f"{kind} cu_seqlens"],
                    seq_length,
                    positions,
                    there[f"{kind} g"],
                    attention=kind,
                ),
            )
            for kind in kinds
        ]
        mixed = MixedRows(tuple(parts), there["places"])
    elif batch.is_causal is not None:
        attention = "causal" if np.all(batch.is_causal) else "bidirectional"
    return PackedRows.of(
        there["cu_seqlens"],
        seq_length,
        positions,
        there["g"],
        first_slot=first_slot,
        attention=attention,
        mixed=mixed,
    )


def _by_row(batch: Batch, slots: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many of these slots of the stream lie in each row [m]."""
    return np.bincount(slots // batch.rows.seq_length, minlength=len(batch.rows.g))


def segment_boundaries(
    cu_seqlens: NDArray[np.int32], *, powers_of_two: bool = False
) -> NDArray[np.int32]:
    """Return boundaries [n + 1] of the segments that hold slots, then a few empty segments.

    A kernel has work for every segment, even an empty one, and rows have room for hundreds. The
    count is rounded up by at most an eighth, so that few shapes occur; or to a power of two, so
    that almost all micro-batches have one of two shapes.
    """
    begins = np.flatnonzero(np.diff(cu_seqlens))
    if powers_of_two:
        multiple = 1 << (len(begins) - 1).bit_length()
    else:
        multiple = max(1 << len(begins).bit_length() >> 4, 1)
    missing = -len(begins) % multiple
    return np.pad(cu_seqlens[begins], (0, missing + 1), constant_values=cu_seqlens[-1])


def local_slots(slots: int) -> slice:
    """Return the range of a stream's slots that this context-parallel rank holds."""
    rank, size = distributed.context_parallel()
    return slice(rank * slots // size, (rank + 1) * slots // size)


def scored_capacity(kind: str, slots: int, scored_share: float) -> int:
    """Return the number of scored positions that a device of `kind` takes at a time.

    A GPU takes the expected number for `slots` slots at a rate of `scored_share` plus six standard
    deviations, so that about one micro-batch in 10^9 has another shape. A CPU takes 1: padded
    positions would cost it real work.
    """
    if kind == "cpu":
        return 1
    expected = slots * scored_share
    most = math.ceil(expected + 6.0 * math.sqrt(expected * (1.0 - scored_share)))
    return -(-min(most, slots) // POSITIONS_MULTIPLE) * POSITIONS_MULTIPLE


def padded_positions(scored: int, capacity: int) -> int:
    """Return the number of positions to compute for `scored` ones: a multiple of `capacity`.

    Overflow takes one more capacity. Zero scored positions take one too, unless `capacity` is 1.
    """
    return max(-(-scored // capacity), int(capacity > 1)) * capacity


def forward_step(
    batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[torch.Tensor | SummedLoss, LossFunction]:
    """Run the next micro-batch; return the stage's output and the function that sums its loss."""
    batch = next(batches)
    batch.wait()
    output = model(
        tokens=batch.tokens,
        packed=batch.packed,
        scored=batch.scored,
        labels=batch.labels,
        weights=batch.weights,
    )
    return output, partial(_summed_loss, batch)


def _summed_loss(batch: MicroBatch, loss: SummedLoss) -> tuple[torch.Tensor, torch.Tensor, Report]:
    """Return (sum of the loss, tokens to average over, report) for losses [n] at the scored slots.

    Megatron-Core sums over micro-batches and ranks and divides gradients by the total, so the loss
    is the mean over these tokens of the global batch: mostly the scored ones. The report holds g,
    sums and tokens by row [m].
    """
    # by_position holds the rows' scored positions one row after the other, padded ones last, so
    # that counts [m] are the lengths of segments. index_add_ would sum in another order from run to
    # run on a GPU. unsafe: the checks of lengths would wait for the device.
    sums = torch.segment_reduce(loss.by_position.double(), "sum", lengths=batch.counts, unsafe=True)
    report = {"g": batch.packed.g, "loss_sums": sums, "counts": batch.averaged}
    return loss.total, batch.total, report
