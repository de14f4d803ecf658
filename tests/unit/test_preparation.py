"""The thread ahead of the step: order, errors, its end; steps, digests and operations."""

import dataclasses
import itertools
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.model import counts
from megatron_ettin.order.digest import mask_digest, token_digest
from megatron_ettin.order.steps import find_step_end, pass_skipped_rows
from megatron_ettin.training.preparation import phase_micro_batches, phase_steps, prefetch
from tests.conftest import TinyCorpus
from tests.training import starting_state, tiny_loader


def preparing() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "preparation"]


def test_items_come_in_order_and_the_thread_ends() -> None:
    with prefetch(iter(range(100))) as items:
        assert list(items) == list(range(100))
    assert not preparing()


def test_it_is_ahead_by_its_depth_and_no_more() -> None:
    begun: list[int] = []

    def counting() -> Iterator[int]:
        for i in itertools.count():
            begun.append(i)
            yield i

    with prefetch(counting(), depth=2) as items:
        assert [next(items), next(items), next(items)] == [0, 1, 2]
        deadline = time.monotonic() + 10
        while len(begun) < 5:
            assert time.monotonic() < deadline, "it does not work ahead"
            time.sleep(0.001)
        time.sleep(0.05)
        assert begun == [0, 1, 2, 3, 4]
    assert not preparing()


def test_an_error_surfaces_where_its_item_is_asked_for_with_its_own_traceback() -> None:
    def spoilt() -> Iterator[int]:
        yield 1
        raise LookupError("row 7")

    with prefetch(spoilt()) as items:
        assert next(items) == 1
        with pytest.raises(LookupError, match="row 7") as raised:
            next(items)
    assert "spoilt" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert not preparing()


def fail_within(error: type[BaseException]) -> None:
    with prefetch(itertools.count()) as items:
        next(items)
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_thread_ends_with_a_block_that_fails(error: type[BaseException]) -> None:
    with pytest.raises(error):
        fail_within(error)
    assert not preparing()


def wait_for_a_slow_item() -> None:
    def slow() -> Iterator[int]:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        yield 0

    with prefetch(slow()) as items:
        next(items)


def test_an_interrupt_ends_the_wait_and_the_thread() -> None:
    # A shell's background jobs start with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            wait_for_a_slow_item()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not preparing()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "objective", ["MaskedLM", "CausalLM", "MaskedNextToken", "MaskedDiffusion"]
)
def test_a_phase_is_prepared_step_by_step(
    tiny_corpus: TinyCorpus, tmp_path: Path, objective: str
) -> None:
    config, loader = tiny_loader(tiny_corpus, tmp_path, objective)
    order, phase = loader.order, loader.order.spec.phases[0]
    g, flops = 0, 0.0
    with prefetch(
        phase_micro_batches(config, loader, starting_state(loader), phase.end_g)
    ) as prepared:
        for number, (step, items) in enumerate(
            itertools.groupby(prepared, key=attrgetter("step")), start=1
        ):
            end = find_step_end(phase, config.phases[0], [], g=g, phase_tokens=0)
            assert (step.step, step.phase, step.g_begin, step.g_end) == (number, 0, g, end)
            assert step.tokens == order.row_tokens(g, end).sum()
            batches = list(loader.micro_batches(g, end))
            lanes = np.zeros(5, dtype=np.uint64)
            for item, batch in zip(items, batches, strict=True):
                assert item.micro_batch.tokens.tolist() == batch.tokens.tolist()
                lanes += item.lanes
                flops += item.flops
            tokens = [
                token_digest(batch.rows, loader.objective.original_tokens(batch))
                for batch in batches
            ]
            assert lanes[:2].tolist() == order.order_digests(g, end).sum(axis=0).tolist()
            assert lanes[2:4].tolist() == np.sum(tokens, axis=0).tolist()
            assert lanes[4] == np.sum([mask_digest(batch) for batch in batches])
            g = end
    assert g == phase.end_g
    assert (phase.end_g - phase.start_g) % 16, "the last step is short"
    # Each piece is a document of its own; what is scored was counted above.
    pieces = order.pieces(phase.start_g, phase.end_g).slots
    scored = sum(
        int(batch.loss_mask.sum()) for batch in loader.micro_batches(phase.start_g, phase.end_g)
    )
    expected = (
        sum(
            counts.document_flops(config.model, config.objective.attention, [length], 0).model
            for length in pieces.tolist()
        )
        + counts.document_flops(config.model, config.objective.attention, [], scored).model
    )
    assert flops == pytest.approx(expected, rel=1e-12)


def test_steps_leave_out_rows_and_go_on_from_any_state(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    data = {**tiny_corpus.data, "skip_rows": [[5, 9], [40, 44]]}
    config, loader = tiny_loader(tiny_corpus, tmp_path, "CausalLM", data=data)
    phase = loader.order.spec.phases[0]
    steps = list(phase_steps(config, loader.order, starting_state(loader), phase.end_g))
    trained = [g for step in steps for g in range(step.g_begin, step.g_end)]
    skipped = {*range(5, 9), *range(40, 44)}
    assert trained == [g for g in range(phase.end_g) if g not in skipped]
    done = steps[2]
    state = dataclasses.replace(
        starting_state(loader),
        step=done.step,
        g=pass_skipped_rows(phase, config.data.skip_rows, done.g_end),
        phase_tokens=sum(step.tokens for step in steps[:3]),
    )
    assert list(phase_steps(config, loader.order, state, phase.end_g)) == steps[3:]
    at_end = dataclasses.replace(starting_state(loader), g=phase.end_g)
    assert list(phase_steps(config, loader.order, at_end, phase.end_g)) == []
