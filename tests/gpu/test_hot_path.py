"""On a GPU: a step waits for nothing, and what is sent there stays until it has been read."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig
from megatron_ettin.data.orders import open_order
from megatron_ettin.objectives import MaskedLM
from megatron_ettin.training import set_up
from megatron_ettin.training.device_copy import make_copy_stream
from megatron_ettin.training.interval import Interval
from megatron_ettin.training.loop import train_step
from megatron_ettin.training.micro_batch import (
    NO_LABEL,
    make_micro_batch,
    padded_positions,
)
from megatron_ettin.training.preparation import phase_micro_batches, prefetch
from tests.conftest import TinyCorpus
from tests.orders import FIRST, make_loader, make_order
from tests.runs import tiny_config

pytestmark = [
    pytest.mark.gpu,
    # Said by torch when the mode is set.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("objective", ["MaskedLM", "CausalLM"])
def test_a_step_waits_for_nothing(tiny_corpus: TinyCorpus, tmp_path: Path, objective: str) -> None:
    hardware = {"micro_batch_tokens": 512, "precision": "bf16"}
    config = tiny_config(tiny_corpus, tmp_path / "run", objective=objective, hardware=hardware)
    with distributed.process_groups(config.hardware):
        order = open_order(config)
        state = set_up.starting_state(config, order)
        run = set_up.build_training(config, order, state)
        with run.reporter:
            state = set_up.restore(run, state)
            interval, end = Interval(), order.spec.phases[0].end_g
            with prefetch(phase_micro_batches(config, run.loader, state, end)) as prepared:
                steps = itertools.groupby(prepared, key=attrgetter("step"))
                # The first steps compile kernels and build tables.
                for step, batches in itertools.islice(steps, 2):
                    state = train_step(run, step, batches, state, 1e-3, interval)
                with waiting_is_an_error():
                    for step, batches in itertools.islice(steps, 3):
                        state = train_step(run, step, batches, state, 1e-3, interval)
            assert state.step == 5
            assert interval.sum_over_ranks().loss > 0.0
        run.recorder.close()


def test_what_is_sent_stays_until_it_has_been_read(tiny_corpus: TinyCorpus) -> None:
    with distributed.process_groups(HardwareConfig()):
        order, stream = make_order(tiny_corpus, FIRST), make_copy_stream()
        loader = make_loader(order, MaskedLM(), micro_batch_tokens=2 * FIRST.seq_length)
        batches = list(loader.micro_batches(0, 200))
        sums = []
        for batch in batches:
            slots = slice(0, len(batch.tokens))
            prepared = make_micro_batch(batch, slots=slots, capacity=128, stream=stream)
            prepared.wait()
            torch.cuda._sleep(1_000_000)  # so that the copies of later rounds overtake the reading
            sums.append(torch.stack([prepared.tokens.sum(), prepared.labels.sum()]))
            del prepared
        found = torch.stack(sums).tolist()
    for (tokens, labels), batch in zip(found, batches, strict=True):
        scored = int(batch.loss_mask.sum())
        filled = padded_positions(scored, 128) - scored
        expected = int(batch.labels[batch.loss_mask].sum()) + filled * NO_LABEL
        assert (tokens, labels) == (batch.tokens.sum(), expected)
