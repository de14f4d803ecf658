"""CUDA graphs: the forward and backward pass of a micro-batch, launched at once.

A graph holds Megatron-Core's own loop over one micro-batch, with the hooks that accumulate
gradients. The gradients are reduced over ranks outside the graph, once a step.

No GPU has run this yet.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol, cast

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ettin import distributed
from megatron_ettin.model.ettin_model import EttinModel
from megatron_ettin.training.micro_batch import MicroBatch, Report

logger = logging.getLogger(__name__)


class Capture(Protocol):
    """Captures functions as CUDA graphs."""

    def __call__(self, function: Callable[[], Report]) -> Callable[[], Report]:
        """Return the replay of `function`; each replay overwrites the result of the last."""

    def beside(self) -> AbstractContextManager[None]:
        """Return the block for passes without a graph; the next replay overwrites what they made.

        They take the memory that the graphs do not need between two replays.
        """


#: Micro-batches of a shape that run without a graph first: they compile and choose kernels.
WARM_UP = 2
#: Most shapes that are captured. Shapes beyond this number are too rare to pay for a capture.
MOST_GRAPHS = 32


class CudaCapture:
    """Captures functions from the current stream; their graphs share one pool of memory.

    So only one graph may run at a time, and its result must be copied before another runs.
    """

    def __init__(self) -> None:
        """Start with no memory."""
        self._pool = torch.cuda.MemPool()
        self._has_graphs = False

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Let passes take memory from the graphs' pool, which holds the activations of one pass.

        Passes before the first graph allocate outside of it. They also make what stays, such as
        workspaces of libraries, which no replay may overwrite.
        """
        if not self._has_graphs:
            yield
            return
        # A pool serves one thread, and autograd would run the backward pass in another one.
        with torch.cuda.use_mem_pool(self._pool), torch.autograd.set_multithreading_enabled(False):
            yield

    def __call__(self, function: Callable[[], Report]) -> Callable[[], Report]:
        """Return the replay of `function`; each replay overwrites the result of the last."""
        graph = torch.cuda.CUDAGraph()
        self._has_graphs = True
        # thread_local: other threads, which prefetch micro-batches and watch collectives, may call
        # CUDA during the capture.
        with torch.cuda.graph(
            graph,
            # torch's annotation knows handles only.
            pool=cast(Any, self._pool.id),
            stream=torch.cuda.current_stream(),
            capture_error_mode="thread_local",
        ):
            report = function()

        def replay() -> Report:
            graph.replay()
            return report

        return replay


class GraphedForwardBackward:
    """Runs a step's micro-batches as `get_forward_backward_func()` does, with a graph per shape.

    It needs the whole model on each rank, and a current stream that is not the default one.
    """

    def __init__(
        self,
        stage: EttinModel,
        new_capture: Callable[[], Capture] = CudaCapture,
        finalize: Callable[..., None] = finalize_model_grads,
    ) -> None:
        """Start without graphs; `new_capture` makes the capture for the graphs of a phase.

        `finalize` is Megatron-Core's `finalize_model_grads`, or a function that calls it.
        """
        self._finalize = finalize
        self._stage = stage
        # This class finalises a step's gradients, not each of its micro-batches.
        stage.config.finalize_model_grads_func = None
        self._new_capture = new_capture
        self._forget()

    def _forget(self) -> None:
        """Drop all graphs: each reads the rotary tables that it was captured with."""
        self._rotary = self._stage.rotary
        self._of_shapes: dict[tuple[int, ...], _ShapeGraph] = {}
        # A pool that all its graphs have left cannot be captured to again.
        self._capture = self._new_capture()

    def __call__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Iterator[MicroBatch],
        model: torch.nn.Module,
        num_microbatches: int,
        **sizes: int,
    ) -> list[Report]:
        """Run the next micro-batches, finalise the gradients, return the micro-batches' reports."""
        if self._rotary is not self._stage.rotary:
            self._forget()

        def run_passes(batch: MicroBatch) -> Report:
            (report,) = get_forward_backward_func()(
                forward_step_func=forward_step_func,
                data_iterator=iter([batch]),
                model=model,
                num_microbatches=1,
                **sizes,
            )
            return report

        reports = []
        total = torch.zeros([], dtype=torch.int32, device=distributed.device())
        for batch in itertools.islice(data_iterator, num_microbatches):
            batch.wait()
            total += batch.total
            reports.append(self._of_shape(batch).run(batch, run_passes))
        self._finalize([model], total)
        return reports

    def _of_shape(self, batch: MicroBatch) -> _ShapeGraph:
        shapes = batch.shapes
        if shapes not in self._of_shapes:
            is_rare = len(self._of_shapes) >= MOST_GRAPHS
            self._of_shapes[shapes] = _ShapeGraph(self._capture, is_rare=is_rare)
        return self._of_shapes[shapes]


class _ShapeGraph:
    """Passes of micro-batches of equal shapes: first without a graph, then by its replay."""

    def __init__(self, capture: Capture, *, is_rare: bool) -> None:
        """Start without a graph; never capture one for a rare shape."""
        self._capture = capture
        self._is_rare = is_rare
        self._left_to_warm_up = WARM_UP
        self._captured: tuple[MicroBatch, Callable[[], Report]] | None = None

    def run(self, batch: MicroBatch, run_passes: Callable[[MicroBatch], Report]) -> Report:
        """Run the passes of `batch` once its copy has been waited for; return its report."""
        if self._is_rare or self._left_to_warm_up:
            self._left_to_warm_up = max(self._left_to_warm_up - 1, 0)
            with self._capture.beside():
                report = run_passes(batch)
            return _copied(report)
        if self._captured is None:
            own = batch.clone()
            self._captured = own, self._capture(partial(run_passes, own))
            logger.info("a CUDA graph for micro-batches of shapes %s", batch.shapes)
        own, replay = self._captured
        own.copy_values(batch)
        return _copied(replay())


def _copied(report: Report) -> Report:
    """Return a copy of a report, since the next replay writes to the memory that it is in."""
    return {name: value.clone() for name, value in report.items()}
