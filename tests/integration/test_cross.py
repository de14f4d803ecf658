"""Continued training with another objective, both ways, in this process."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ettin import checkpoint, distributed
from megatron_ettin.checkpoint_files import CheckpointError
from megatron_ettin.config import RunConfig, parse_args
from megatron_ettin.data.orders import open_order
from megatron_ettin.model.provider import logical_parameters
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.pretrain import pretrain
from megatron_ettin.training import set_up
from megatron_ettin.training.interval import Interval
from megatron_ettin.training.loop import Training, train_step
from megatron_ettin.training.preparation import phase_micro_batches, phase_steps
from tests.conftest import TinyCorpus
from tests.independent.program import rebuild
from tests.parity.runs import load_parameters

# What Megatron-Core says of its own calls while it trains; pretrain's command line silences it.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{category}")
    for category in ("UserWarning", "FutureWarning", "DeprecationWarning")
]

SOURCE_PHASE = {
    "name": "short",
    "train_tokens": 30_000,
    "seq_length": 128,
    "global_batch_size": 16,
}
CROSS_PHASE = {
    "name": "long",
    "train_tokens": 30_000,
    "seq_length": 256,
    "global_batch_size": 8,
    "lr_end": 0.1,
    "lr_decay": "linear",
    "lr_decay_tokens": 10_000,
    "rotary_base_global": 160_000.0,
    "rotary_base_local": 160_000.0,
}


def make_run(corpus: TinyCorpus, run_dir: Path, *arguments: str, **sections: Any) -> RunConfig:
    path = corpus.write_config(run_dir.with_suffix(".yaml"), **sections)
    return parse_args([f"--config={path}", f"--run_dir={run_dir}", *arguments])


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir, "train")]


def tensors(value: Any) -> list[torch.Tensor]:
    """Return all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for each in value for t in tensors(each)] if isinstance(value, list | tuple) else []


def assert_equal_bits(run: Training, expected: dict[str, torch.Tensor]) -> None:
    found = dict(logical_parameters(run.stage))
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def assert_fresh_start(config: RunConfig, source: Path) -> None:
    """Check what the run is before its first step, and after that step, whose rate is zero."""
    expected = load_parameters(source)
    with distributed.process_groups(config.hardware):
        order = open_order(config)
        state = set_up.starting_state(config, order)
        assert (state.g, state.step, state.consumed_tokens) == (0, 0, 0)
        run = set_up.build_training(config, order, state)
        with run.reporter:
            state = set_up.restore(run, state)
            assert state.phase_ids == tuple(order.spec.phase_ids())
            assert state.phase_ids != checkpoint.read_state(source).phase_ids
            assert_equal_bits(run, expected)
            adam = run.optimizer.optimizer
            assert all(not tensor.any() for tensor in tensors(dict(adam.state)))
            assert {group.get("step", 0) for group in adam.param_groups} == {0}
            run.stage.set_rotary_bases(*run.config.phases[0].rotary_bases)
            batches = phase_micro_batches(config, run.loader, state, order.spec.phases[0].end_g)
            step = next(phase_steps(config, order, state, order.spec.phases[0].end_g))
            train_step(run, step, batches, state, 0.0, Interval())
            # The optimizer's own copy of the weights is the source's too, or it would replace them.
            assert_equal_bits(run, expected)
        run.recorder.record_end(state)
    shutil.rmtree(config.run_dir)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "shift"),
    [("CausalLM", "MaskedNextToken", 1), ("MaskedLM", "CausalLM", 0)],
    ids=["decoder to encoder", "encoder to decoder"],
)
def test_training_goes_on_with_another_objective(
    before: str, after: str, shift: int, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    first = make_run(tiny_corpus, tmp_path / "first", objective=before, phases=[SOURCE_PHASE])
    pretrain(first)
    source = RunFolder(tmp_path / "first").newest_checkpoint()
    assert source is not None
    config = make_run(
        tiny_corpus,
        tmp_path / "cross",
        f"--checkpoint.initialize_from={source}",
        "--checkpoint.save_every_tokens=20000",
        objective=after,
        phases=[CROSS_PHASE],
    )
    assert_fresh_start(config, source)
    pretrain(config)
    curve = losses(tmp_path / "cross")
    assert sum(curve[-5:]) / 5 < curve[0] - 0.1
    newest = RunFolder(tmp_path / "cross").newest_checkpoint()
    assert newest is not None
    saved = checkpoint.read_model(newest)
    assert (saved.attention, saved.prediction_shift) == (config.objective.attention, shift)
    assert (saved.rotary_base_global, saved.rotary_base_local) == (160_000.0, 160_000.0)

    # Resuming takes the run's own checkpoint; where the weights once came from may be gone.
    shutil.rmtree(newest)
    shutil.rmtree(tmp_path / "first")
    resumed = dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, resume=True)
    )
    pretrain(resumed)
    assert losses(tmp_path / "cross") == curve
    assert rebuild(tmp_path / "cross").startswith(f"PASS {after}: ")


@pytest.mark.slow
def test_weights_that_are_not_there_are_named(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    config = make_run(
        tiny_corpus,
        tmp_path / "cross",
        f"--checkpoint.initialize_from={tmp_path / 'nowhere'}",
        objective="CausalLM",
        phases=[CROSS_PHASE],
    )
    with pytest.raises(CheckpointError, match="nowhere: no checkpoint here"):
        pretrain(config)
    assert not (tmp_path / "cross").exists()
