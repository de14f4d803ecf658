"""Input of steps, prefetched by a thread: a pure function of (configuration, rows).

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_ettin import distributed
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import RunConfig
from megatron_ettin.data.loader import Loader
from megatron_ettin.model.counts import document_flops
from megatron_ettin.objectives import Batch
from megatron_ettin.order import Order
from megatron_ettin.order.digest import mask_digest, token_digest
from megatron_ettin.order.steps import plan_steps
from megatron_ettin.rows import PADDING
from megatron_ettin.training.device_copy import make_copy_stream
from megatron_ettin.training.micro_batch import (
    MicroBatch,
    local_slots,
    make_micro_batch,
    scored_capacity,
)

#: Digest lanes of a step, [LANES] uint64: order (low, high), token (low, high), mask.
LANES = 5
ORDER_LANES, TOKEN_LANES, MASK_LANE = slice(0, 2), slice(2, 4), 4
#: Items that `prefetch` computes ahead; each holds a micro-batch in (pinned) host memory.
DEPTH = 2

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class StepRange:
    """Rows of one step: the columns of its ledger record that every rank knows."""

    step: int
    """Number of the step, counted from 1."""
    phase: int
    """Index of the phase."""
    g_begin: int
    g_end: int
    """End of the rows [g_begin, g_end)."""
    tokens: int
    """Tokens of these rows on all ranks, padding left out."""


class Prepared(NamedTuple):
    """Micro-batch of a step, with the figures that are reported of it."""

    step: StepRange
    micro_batch: MicroBatch
    lanes: NDArray[np.uint64]
    """[LANES] digests of its rows; zero unless this rank counts rows."""
    flops: float
    """Operations of the model that its documents take; zero unless this rank counts rows."""


def phase_micro_batches(
    config: RunConfig,
    loader: Loader,
    state: RunState,
    end: int,
    skip_rows: Sequence[tuple[int, int]] | None = None,
) -> Iterator[Prepared]:
    """Yield this rank's micro-batches of all steps up to row `end`, where a phase ends."""
    stream, counts_rows = make_copy_stream(), distributed.counts_rows()
    for step in phase_steps(config, loader.order, state, end, skip_rows):
        for batch, prepared in _prepare(
            loader, step.g_begin, step.g_end, stream, for_graphs=config.hardware.cuda_graphs
        ):
            # The ranks of a model replica prepare the same rows; one of them counts the sums.
            yield Prepared(
                step=step,
                micro_batch=prepared,
                lanes=digest_lanes(batch, loader, step.phase)
                if counts_rows
                else np.zeros(LANES, dtype=np.uint64),
                flops=batch_flops(batch, config) if counts_rows else 0.0,
            )


def phase_steps(
    config: RunConfig,
    order: Order,
    state: RunState,
    end: int,
    skip_rows: Sequence[tuple[int, int]] | None = None,
) -> Iterator[StepRange]:
    """Yield the steps from `state` to row `end`, where a phase ends.

    `skip_rows` are the ranges to leave out, by their first row; None: those of the configuration.
    """
    skip_rows = config.data.skip_rows if skip_rows is None else skip_rows
    planned = plan_steps(
        order, config.phases, skip_rows, g=state.g, phase_tokens=state.phase_tokens
    )
    rows = itertools.takewhile(lambda rows: rows[0] < end, planned)
    for number, (g_begin, g_end) in enumerate(rows, start=state.step + 1):
        yield StepRange(
            step=number,
            phase=order.spec.phase_index(g_begin),
            g_begin=g_begin,
            g_end=g_end,
            tokens=int(order.row_tokens(g_begin, g_end).sum()),
        )


def micro_batches(loader: Loader, begin: int, end: int) -> Iterator[MicroBatch]:
    """Yield this rank's micro-batches of rows [begin, end), which lie in one phase."""
    for _, prepared in _prepare(loader, begin, end, make_copy_stream()):
        yield prepared


def _prepare(
    loader: Loader,
    begin: int,
    end: int,
    stream: torch.cuda.Stream | None,
    *,
    for_graphs: bool = False,
) -> Iterator[tuple[Batch, MicroBatch]]:
    spec = loader.order.spec
    share = loader.objective.scored_share(spec.phases[spec.phase_index(begin)].name)
    slots = local_slots(loader.micro_batch_slots(begin))
    capacity = scored_capacity(distributed.device().type, slots.stop - slots.start, share)
    for batch in loader.micro_batches(begin, end):
        yield (
            batch,
            make_micro_batch(
                batch, slots=slots, capacity=capacity, stream=stream, for_graphs=for_graphs
            ),
        )


def digest_lanes(batch: Batch, loader: Loader, phase: int) -> NDArray[np.uint64]:
    """Return [LANES] digests of a batch's rows, with tokens rebuilt from the batch itself.

    So the ledger speaks of the tokens that the model gets, not of those that the order promises.
    """
    order = loader.order.order_digests_of(phase, batch.rows.g).sum(axis=0, dtype=np.uint64)
    tokens = token_digest(batch.rows, loader.objective.original_tokens(batch))
    return np.concatenate([order, tokens, mask_digest(batch)])


def batch_flops(batch: Batch, config: RunConfig) -> float:
    """Return the model's operations to train on a batch's documents, forward and backward."""
    lengths, is_document = np.diff(batch.rows.cu_seqlens), batch.rows.segment_kind != PADDING
    scored = int(np.count_nonzero(batch.loss_mask))
    if batch.is_causal is None:
        attention = config.objective.attention
        return document_flops(config.model, attention, lengths[is_document], scored).model
    in_rows = np.broadcast_to(batch.is_causal, len(batch.rows.g))
    is_causal = np.repeat(in_rows, len(lengths) // len(in_rows))
    causal = document_flops(config.model, "causal", lengths[is_document & is_causal], scored)
    others = document_flops(config.model, "bidirectional", lengths[is_document & ~is_causal], 0)
    return causal.model + others.model


@contextmanager
def prefetch(items: Iterator[Item], depth: int = DEPTH) -> Iterator[Iterator[Item]]:
    """Compute `items` in a thread, up to `depth` of them ahead, and provide them in the block.

    The thread ends with the block, however that ends. Its exception is raised in place of the item
    that failed, with the thread's own traceback.
    """
    work = _Prefetch(items, depth)
    thread = threading.Thread(target=work.run, name="preparation")
    try:
        thread.start()
        yield work.results()
    finally:
        work.stop()
        # After an interrupt inside start() the thread may not be alive yet; it then sees the stop
        # and ends by itself.
        if thread.is_alive():
            thread.join()


class _Ended(NamedTuple):
    """Last result of the thread."""

    error: BaseException | None


class _Prefetch(Generic[Item]):
    """State that the thread of `prefetch` shares with the consumer.

    The semaphore counts free places: the thread takes one for each item, the consumer gives one
    back for each item that it takes.
    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self._items = items
        self._results: SimpleQueue[Item | _Ended] = SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._stopped = False

    def run(self) -> None:
        """Compute items while there is room, until they end or the consumer stops."""
        error = None
        try:
            while self._has_room():
                self._results.put(next(self._items))
        except StopIteration:
            pass
        except BaseException as raised:  # any error is the consumer's to handle
            error = raised
        self._results.put(_Ended(error))

    def results(self) -> Iterator[Item]:
        """Yield the items as they get ready."""
        while not isinstance(result := self._results.get(), _Ended):
            self._room.release()
            yield result
        if result.error is not None:
            raise result.error

    def stop(self) -> None:
        """Let `run` return after its current item."""
        self._stopped = True
        self._room.release()  # wakes a thread that waits for room

    def _has_room(self) -> bool:
        self._room.acquire()
        return not self._stopped
