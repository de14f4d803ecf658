"""StableAdamW inside Megatron-Core's distributed optimizer: fp32 state, sharded over DP."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_ettin import cpu, distributed
from megatron_ettin.config import HardwareConfig, OptimizerConfig
from megatron_ettin.training.stable_adamw import StableAdamW, TensorStatistics


class ShardedStableAdamW(DistributedOptimizer):  # type: ignore[misc]
    """Megatron-Core's DistributedOptimizer around StableAdamW, on a GPU or without one.

    Megatron-Core keeps `step` per parameter for torch's Adam and in the parameter groups for
    Transformer Engine's; ours keeps it in the groups, so the second kind of handling applies.
    """

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Describe the state for a checkpoint; moments exist from here on."""
        self.optimizer.initialize_state()
        with cpu.optimizer_mode():
            return super().sharded_state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a loaded state."""
        with cpu.optimizer_mode():
            super().load_state_dict(state_dict)

    def step(self) -> Any:
        """Update the weights; returns Megatron-Core's (success, gradient norm, zero count)."""
        with cpu.optimizer_mode():
            return super().step()

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr


def build_optimizer(
    ddp: DistributedDataParallel, config: OptimizerConfig, hardware: HardwareConfig
) -> ShardedStableAdamW:
    """Return the optimizer of this rank's stage. Norms and biases are not decayed."""
    # StableAdamW keeps `step` where Transformer Engine's Adam does: in the parameter groups.
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = True
    parameters = [p for p in ddp.parameters() if p.requires_grad]
    adam = StableAdamW(
        [
            _group([p for p in parameters if p.dim() > 1], wd_mult=1.0),
            _group([p for p in parameters if p.dim() <= 1], wd_mult=0.0),
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    with cpu.optimizer_mode():
        optimizer = ShardedStableAdamW(
            adam,
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                clip_grad=config.clip_grad,
                bf16=hardware.precision == "bf16",
                use_distributed_optimizer=True,
            ),
            None,
            None,
            model_chunks=[ddp],
            per_model_buffers={0: ddp.buffers},
            data_parallel_group=distributed.data_parallel_group(),
            data_parallel_group_gloo=distributed.data_parallel_group_gloo(),
            data_parallel_group_idx=distributed.model_parallel_rank(),
            distributed_optimizer_instance_id=0,
        )
    optimizer.grad_stats_parallel_group = distributed.world_group()
    optimizer.tp_group = distributed.tensor_parallel_group()
    adam.statistics = _statistics(optimizer, parameters)
    return optimizer


def _group(parameters: list[torch.nn.Parameter], *, wd_mult: float) -> dict[str, Any]:
    """Return a parameter group with the keys by which Megatron-Core tells groups apart."""
    return {
        "params": parameters,
        "wd_mult": wd_mult,
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
    }


def _statistics(
    optimizer: ShardedStableAdamW, parameters: list[torch.nn.Parameter]
) -> TensorStatistics:
    """Return slots by module order, which all ranks of the stage share."""
    slot: dict[int, int] = {}
    counted: dict[int, bool] = {}
    numel = torch.zeros(len(parameters), device=distributed.device())
    for index, parameter in enumerate(parameters):
        whole = parameter.numel()
        is_sharded = getattr(parameter, "tensor_model_parallel", False)
        if is_sharded:
            whole *= distributed.tensor_parallel_size()
        numel[index] = whole
        if parameter not in optimizer.model_param_group_index_map:
            continue  # another data-parallel rank owns all of it
        group, order = optimizer.model_param_group_index_map[parameter]
        shard = optimizer.optimizer.param_groups[group]["params"][order]
        slot[id(shard)] = index
        counted[id(shard)] = is_sharded or distributed.tensor_parallel_rank() == 0
    return TensorStatistics(
        slot=slot, counted=counted, numel=numel, group=distributed.stage_group()
    )
