"""On a GPU: a step waits for nothing, and what is sent there stays until it has been read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig
from megatron_ettin.objectives import MaskedLM
from megatron_ettin.training.device_copy import make_copy_stream
from megatron_ettin.training.micro_batch import (
    NO_LABEL,
    make_micro_batch,
    padded_positions,
)
from tests.conftest import TinyCorpus
from tests.orders import FIRST, make_loader, make_order
from tests.runs import tiny_config
from tests.training import train_within

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
        # The first steps compile kernels and build tables.
        state, loss = train_within(config, waiting_is_an_error(), before=2, inside=3)
    assert state.step == 5
    assert loss > 0.0


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
