"""What CONTRIBUTING promises of an optimizer, for every name that the configuration takes.

And for one that keeps a single moment: no part of the state has to be made up for Megatron-Core.
"""

import inspect
from pathlib import Path
from typing import get_args

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_ettin.config import (
    HardwareConfig,
    ModelConfig,
    OptimizerConfig,
    OptimizerName,
    SeedConfig,
)
from megatron_ettin.model.provider import build_model
from megatron_ettin.shard_saver import ShardSaver
from megatron_ettin.shards import read_shards
from megatron_ettin.training import optimizer as optimizers
from megatron_ettin.training.block_optimizer import BlockOptimizer
from tests.integration.optimizer_program import CASES

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, vocab_size=100
)
NAMES: tuple[OptimizerName, ...] = get_args(OptimizerName)
#: Names whose update is in `training/`; tests/unit/test_muon.py is about the other.
OURS = [name for name in NAMES if name != "muon"]


class SignOfMomentum(BlockOptimizer):
    """Lion (arXiv 2302.06675), in the lines that docs/extending.md shows."""

    moments = ("exp_avg",)

    def update(self) -> None:
        """Move each weight by the rate, against the sign of its averaged gradient."""
        for block in self.blocks():
            lr, (beta1, beta2) = block.group["lr"], block.group["betas"]
            firsts = block.moments["exp_avg"]
            signs = torch._foreach_lerp(firsts, block.gradients, 1.0 - beta1)
            torch._foreach_sign_(signs)
            torch._foreach_mul_(block.weights, 1.0 - lr * block.decay)
            torch._foreach_add_(block.weights, signs, alpha=-lr)
            torch._foreach_lerp_(firsts, block.gradients, 1.0 - beta2)


class Trained:
    """A model and its optimizer on one rank."""

    def __init__(self, name: OptimizerName, *, shares_state: bool, precision: str) -> None:
        hardware = HardwareConfig(precision=precision)  # type: ignore[arg-type]
        self.stage = build_model(MODEL, "causal", hardware, SeedConfig())
        self.ddp = DistributedDataParallel(
            self.stage.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=shares_state
            ),
            self.stage,
        )
        config = OptimizerConfig(name=name, lr=0.01, weight_decay=0.1)
        self.optimizer = optimizers.build_optimizer(self.ddp, config, hardware)

    def take_steps(self, steps: range) -> None:
        for step in steps:
            self.ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            draw = torch.Generator().manual_seed(step)
            for parameter in self.stage.parameters():
                parameter.main_grad.normal_(generator=draw)
            self.ddp.finish_grad_sync()
            self.optimizer.set_lr(0.01 / step)
            self.optimizer.step()

    def load(self, folder: Path) -> None:
        loaded = read_shards(folder, self.stage, self.optimizer)
        self.stage.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.stage.named_parameters()}


@pytest.fixture(params=[*OURS, "one moment"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> OptimizerName:
    """Name an optimizer; "one moment" takes the place of another's update."""
    if request.param == "one moment":
        monkeypatch.setattr(optimizers, "update_class", lambda _: SignOfMomentum)
        return "adamw"
    chosen: OptimizerName = request.param
    return chosen


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_an_update_and_its_moments_are_counted(name: OptimizerName) -> None:
    config = OptimizerConfig(name=name, lr=1.0, weight_decay=0.0)
    update = optimizers.update_class(name)
    assert (update is None) == (name not in OURS)
    if update is not None:
        assert config.num_moments == len(update.moments), "tools/estimate.py counts them"
        assert not config.needs_whole_tensors


def test_the_recipe_shows_the_lines_that_are_tested_here() -> None:
    recipe = (ROOT / "docs" / "extending.md").read_text()
    lines = inspect.getsource(SignOfMomentum.update).splitlines()[2:]
    assert len(lines) == 8
    assert [line for line in lines if line.strip() not in recipe] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_documented(name: OptimizerName) -> None:
    assert f"`{name}`" in (ROOT / "docs" / "recipe.md").read_text()


def test_every_update_of_ours_is_compared_with_a_reference_in_all_layouts() -> None:
    assert {case.name for case in CASES} == set(OURS), "tests/integration/optimizer_program.py"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shares_state", [True, False])
@pytest.mark.usefixtures("one_process")
def test_a_resumed_optimizer_goes_on_bit_for_bit_either_way(
    name: OptimizerName, shares_state: bool, precision: str, tmp_path: Path
) -> None:
    trained = Trained(name, shares_state=shares_state, precision=precision)
    first = trained.weights
    trained.take_steps(range(1, 4))
    assert all(not torch.equal(weight, first[n]) for n, weight in trained.weights.items())
    pending = ShardSaver(copies=False).begin(tmp_path, trained.stage, trained.optimizer)
    pending.finish(pending.gather())
    update = optimizers.update_class(name)
    assert update is not None
    kept = {
        parts[2]
        for key in FileSystemReader(tmp_path).read_metadata().state_dict_metadata
        if (parts := key.split("."))[:2] == ["optimizer", "state"]
    }
    assert kept == {"param", *update.moments}
    trained.take_steps(range(4, 6))
    for shares in (shares_state, not shares_state):
        resumed = Trained(name, shares_state=shares, precision=precision)
        resumed.load(tmp_path)
        resumed.take_steps(range(4, 6))
        expected = trained.weights
        for n, weight in resumed.weights.items():
            assert torch.equal(weight, expected[n]), f"{n}, shares_state {shares}"
