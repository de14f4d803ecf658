"""Muon, which is Megatron-Core's: refused without its package, and run where that is installed."""

from importlib.util import find_spec

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig, ModelConfig, OptimizerConfig, SeedConfig
from megatron_ettin.model.provider import build_model
from megatron_ettin.training.optimizer import build_optimizer, require_packages

IS_INSTALLED = find_spec("emerging_optimizers") is not None
MUON = OptimizerConfig(name="muon", lr=0.01, weight_decay=0.0)


@pytest.mark.skipif(IS_INSTALLED, reason="emerging_optimizers is installed")
def test_muon_without_its_package_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.name: muon needs .*emerging_optimizers"):
        require_packages(MUON)
    require_packages(OptimizerConfig(lr=0.01, weight_decay=0.0))


@pytest.mark.skipif(not IS_INSTALLED, reason="emerging_optimizers is not installed")
def test_muon_orthogonalises_matrices_and_nothing_else() -> None:
    model = ModelConfig(num_layers=1, hidden_size=64, ffn_hidden_size=96, num_attention_heads=2)
    hardware = HardwareConfig(use_distributed_optimizer=False)
    with distributed.process_groups(hardware):
        stage = build_model(model, "causal", hardware, SeedConfig())
        ddp = DistributedDataParallel(
            stage.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), stage
        )
        optimizer = build_optimizer(ddp, MUON, hardware)
        before = {name: p.detach().clone() for name, p in stage.named_parameters()}
        torch.manual_seed(0)
        for parameter in stage.parameters():
            parameter.main_grad.normal_()
        optimizer.set_lr(0.01)
        optimizer.step()
        moved = {name: p.detach() - before[name] for name, p in stage.named_parameters()}
    # Five Newton-Schulz steps bring singular values to between about 0.7 and 1.2.
    values = torch.linalg.svdvals(moved["head.dense.weight"])
    assert float(values.max() / values.min()) < 2.0
    # AdamW's first step is lr in the direction of the gradient's sign.
    for name in ("embedding.word_embeddings.weight", "head.norm.weight"):
        torch.testing.assert_close(moved[name].abs(), torch.full_like(moved[name], 0.01))
