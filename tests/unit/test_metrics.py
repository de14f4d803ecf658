"""Sums over the steps of an interval, and the share of the GPU's peak."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ettin.devices import GPUS
from megatron_ettin.training.device_figures import mfu_field
from megatron_ettin.training.interval import Interval
from megatron_ettin.training.preparation import phase_micro_batches, phase_steps
from tests.conftest import TinyCorpus
from tests.training import starting_state, tiny_loader


@pytest.mark.usefixtures("one_process")
def test_an_interval_is_the_sum_of_what_was_consumed(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    config, loader = tiny_loader(tiny_corpus, tmp_path, "MaskedLM")
    end = loader.order.spec.phases[0].end_g
    steps = list(phase_steps(config, loader.order, starting_state(loader), end))[:3]
    prepared = list(phase_micro_batches(config, loader, starting_state(loader), end))
    interval = Interval()
    for number, step in enumerate(steps, start=1):
        interval.begin_step(step)
        mine = [item for item in prepared if item.step == step]
        assert len(list(interval.consume(iter(mine)))) == len(mine) > 1
        sums, counts = torch.tensor([1.5, number]), torch.tensor([2, 1])
        interval.add_losses([{"loss_sums": sums.double(), "counts": counts}] * 2)
    summary = interval.sum_over_ranks()
    assert summary.steps == steps
    assert summary.tokens == sum(step.tokens for step in steps)
    assert summary.loss == pytest.approx(2 * (3 * 1.5 + 1 + 2 + 3) / 18)
    assert summary.flops == sum(item.flops for item in prepared if item.step.step <= 3) > 0
    for lanes, step in zip(summary.lanes, steps, strict=True):
        expected = [item.lanes for item in prepared if item.step == step]
        assert lanes.tolist() == np.sum(expected, axis=0).tolist()


def test_the_mfu_is_a_share_of_all_gpus(caplog: pytest.LogCaptureFixture) -> None:
    assert mfu_field(GPUS["h200"], 989.4e12, 4) == {"mfu": pytest.approx(0.25)}
    assert mfu_field(None, 989.4e12, 4) == {}
    assert mfu_field(GPUS["h100"], 4e15, 4) == {}
    assert "4 x H100 SXM 80 GB" in caplog.text
