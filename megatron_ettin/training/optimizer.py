"""The optimizer of a rank's stage: which update, at which rate, and which ranks hold its state."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any, assert_never, get_args

import torch
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.muon import get_megatron_muon_optimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)

from megatron_ettin import cpu, distributed
from megatron_ettin.config import HardwareConfig, OptimizerConfig, OptimizerName, PhaseConfig
from megatron_ettin.model import weight_map
from megatron_ettin.model.ettin_model import EttinModel
from megatron_ettin.model.provider import logical_parameters
from megatron_ettin.training.adamw import AdamW, StableAdamW, TensorStatistics
from megatron_ettin.training.block_optimizer import BlockOptimizer, Moment


class Optimizer(MegatronOptimizer):  # type: ignore[misc]
    """One of Megatron-Core's optimizers, on a GPU or without one."""

    lr = 0.0
    """Learning rate of the last step, or of the next one once it is set."""
    _step_norm: float | None = None
    _measured_norm: float | None = None

    def step(self) -> Any:
        """Update the weights; returns Megatron-Core's (success, gradient norm, zero count)."""
        with cpu.optimizer_mode():
            result = super().step()
        # None or 0.0 where Megatron-Core had no use for the norm.
        self._step_norm = result[1] or self._measured_norm
        return result

    def measure_gradient_norm(self) -> float:
        """Return the norm of the gradients of the step to come, over all ranks; change nothing.

        All ranks call it after the passes of the step; on a GPU it waits for them.
        """
        with cpu.optimizer_mode():
            self.prepare_grads()  # as `step` does again: it copies the gradients of the model
            self._measured_norm = float(self.get_grad_norm())
        return self._measured_norm

    def gradient_norm(self) -> float:
        """Return the norm of the last step's gradients over all ranks, before clipping.

        All ranks call it, before the gradients are zeroed; on a GPU it waits for the step. It still
        answers after a step that was measured but not taken.
        """
        if self._step_norm is not None:
            return self._step_norm
        with cpu.optimizer_mode():
            return float(self.get_grad_norm())

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        self.lr = lr
        for group in self.param_groups:
            group["lr"] = lr


class ShardedOptimizer(Optimizer, DistributedOptimizer):  # type: ignore[misc]
    """A block optimizer with fp32 weights and moments sharded over the data-parallel ranks.

    Megatron-Core keeps `step` per parameter for torch's Adam, and in the parameter groups for
    Transformer Engine's. Ours keeps it in the groups, so it is handled as Transformer Engine's.
    """

    @property
    def optimizer_state_keys(self) -> tuple[Moment, ...]:
        """Names of the moments that there are; Megatron-Core 0.19 asks, 0.16.1 does not."""
        return self.optimizer.moments

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Describe the state for a checkpoint; create moments that do not exist yet."""
        self.optimizer.initialize_state()
        with cpu.optimizer_mode():
            state = super().sharded_state_dict(*args, **kwargs)
        kept = ("param", *self.optimizer.moments)
        state["param_state"] = {
            index: {name: tensor for name, tensor in tensors.items() if name in kept}
            for index, tensors in state["param_state"].items()
        }
        return state

    def _get_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter) -> Any:
        """Return a parameter's fp32 shard and moments by name.

        Megatron-Core 0.16.1 gathers both of Adam's moments, whatever an optimizer keeps. It gets
        one zero, expanded, for a moment that there is not; `sharded_state_dict` drops the result.
        """
        tensors = super()._get_main_param_and_optimizer_states(model_param)
        absent = tensors["param"].new_zeros(()).expand_as(tensors["param"])
        return dict.fromkeys(get_args(Moment), absent) | tensors

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over weights, moments and the number of steps; settings are the configuration's."""
        settings = [_settings(group) for group in self.optimizer.param_groups]
        with cpu.optimizer_mode():
            super().load_state_dict(state_dict)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update({**own, "step": group["step"]})


class _ReplicatedOptimizer(Optimizer):
    """A block optimizer with all its state on every data-parallel rank.

    Its checkpoints are those of ShardedOptimizer.
    """

    model_parameters: list[torch.nn.Parameter]
    """The parameters of the stage, in module order."""

    def sharded_state_dict(
        self,
        model_sharded_state_dict: dict[str, Any],
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describe the state as ShardedOptimizer does: each resumes from checkpoints of both."""
        self.optimizer.initialize_state()
        sharded = get_param_id_to_sharded_param_map(model_sharded_state_dict, self.model_parameters)
        return {
            "optimizer": {"param_groups": [_settings(g) for g in self.optimizer.param_groups]},
            "param_state": {
                index: {
                    key: make_sharded_optimizer_tensor(
                        sharded[index], value, prefix=f"optimizer.state.{key}"
                    )
                    for key, value in self._state_of(parameter).items()
                }
                for index, parameter in enumerate(self.model_parameters)
            },
            "param_state_sharding_type": "fully_reshardable",
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over weights, moments and the number of steps; settings are the configuration's."""
        for index, parameter in enumerate(self.model_parameters):
            for key, value in self._state_of(parameter).items():
                value.copy_(state_dict["param_state"][index][key])
        (steps,) = {group["step"] for group in state_dict["optimizer"]["param_groups"]}
        for group in self.optimizer.param_groups:
            group["step"] = steps

    def _state_of(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        main = _main(parameter)
        return {"param": main.detach(), **self.optimizer.state[main]}


class ReplicatedFp32Optimizer(_ReplicatedOptimizer, FP32Optimizer):  # type: ignore[misc]
    """Replicated optimizer of fp32 models: it updates the model's own weights."""


class ReplicatedBf16Optimizer(_ReplicatedOptimizer, Float16OptimizerWithFloat16Params):  # type: ignore[misc]
    """Replicated optimizer of bf16 models: their weights are roundings of its fp32 weights."""


class Muon(Optimizer, ChainedOptimizer):  # type: ignore[misc]
    """Megatron-Core's Muon for matrices and its AdamW for embedding, norms and biases."""


def update_class(name: OptimizerName) -> type[BlockOptimizer] | None:
    """Return the class of an update that is ours; None for Megatron-Core's own."""
    match name:
        case "stable_adamw":
            return StableAdamW
        case "adamw":
            return AdamW
        case "muon":
            return None
        case _:
            assert_never(name)


def require_packages(config: OptimizerConfig) -> None:
    """Raise ValueError if the optimizer needs a package that is not installed."""
    if update_class(config.name) is None and find_spec("emerging_optimizers") is None:
        raise ValueError(
            f"optimizer.name: {config.name} needs NVIDIA's package emerging_optimizers, which is "
            f"not installed here; install it, or choose stable_adamw or adamw"
        )


def build_optimizer(
    ddp: DistributedDataParallel, config: OptimizerConfig, hardware: HardwareConfig
) -> Optimizer:
    """Return the optimizer of this rank's stage. Norms and biases are not decayed.

    Its state is sharded over data-parallel ranks if the gradients of `ddp` are.
    """
    update = update_class(config.name)
    settings = MegatronOptimizerConfig(
        # Of ours, Megatron-Core is told no more than that it is of Adam's kind.
        optimizer="muon" if update is None else "adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_grad,
        bf16=hardware.parameter_precision == "bf16",
        use_distributed_optimizer=ddp.ddp_config.use_distributed_optimizer,
        # "blockwise", the default, would orthogonalise each tensor-parallel part alone, so that the
        # update would depend on the layout.
        muon_tp_mode="duplicated",
    )
    if update is None:
        with cpu.optimizer_mode():
            return Muon(get_megatron_muon_optimizer(settings, [ddp]).chained_optimizers)
    return _build_ours(update, ddp, config, settings)


def _build_ours(
    update: type[BlockOptimizer],
    ddp: DistributedDataParallel,
    config: OptimizerConfig,
    settings: MegatronOptimizerConfig,
) -> Optimizer:
    parameters = [p for p in ddp.parameters() if p.requires_grad]
    blocks = update(
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
        if settings.use_distributed_optimizer:
            optimizer = _sharded(blocks, settings, ddp)
        else:
            optimizer = _replicated(blocks, settings, parameters)
    optimizer.tp_group = distributed.tensor_parallel_group()
    if isinstance(blocks, StableAdamW):
        blocks.statistics = _statistics(optimizer, ddp.module)
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


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _main(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return the fp32 tensor that a replicated optimizer updates for `parameter`."""
    main: torch.Tensor = getattr(parameter, "main_param", parameter)
    return main


def _sharded(
    blocks: BlockOptimizer, settings: MegatronOptimizerConfig, ddp: DistributedDataParallel
) -> ShardedOptimizer:
    # Megatron-Core reads these two to decide where `step` lives: for Transformer Engine's optimizer
    # in the parameter groups, where ours keeps it too.
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = True
    optimizer = ShardedOptimizer(
        blocks,
        settings,
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
    return optimizer


def _replicated(
    blocks: BlockOptimizer, settings: MegatronOptimizerConfig, parameters: list[torch.nn.Parameter]
) -> _ReplicatedOptimizer:
    optimizer: _ReplicatedOptimizer = (
        ReplicatedBf16Optimizer(blocks, settings, None, None)
        if settings.bf16
        else ReplicatedFp32Optimizer(blocks, settings, None)
    )
    optimizer.model_parameters = parameters
    return optimizer


def _statistics(optimizer: Optimizer, stage: EttinModel) -> TensorStatistics:
    """Return the table of logical tensors, in module order: all ranks of the stage agree on it."""
    entries = weight_map.entries(stage.model_config.num_layers)
    shares_state = isinstance(optimizer, ShardedOptimizer)
    tensor_index: dict[int, int] = {}
    counted: dict[int, bool] = {}
    sizes = []
    for index, (name, parameter) in enumerate(logical_parameters(stage)):
        # Sizes leave out the vocabulary's padding: its gradients are zero and would lower the mean.
        sizes.append(math.prod(weight_map.huggingface_shape(entries[name], stage.model_config)))
        if not shares_state:
            shard = _main(parameter)
        elif parameter in optimizer.model_param_group_index_map:
            group, order = optimizer.model_param_group_index_map[parameter]
            shard = optimizer.optimizer.param_groups[group]["params"][order]
        else:
            continue  # another data-parallel rank owns all of it
        tensor_index[id(shard)] = index
        is_divided = getattr(parameter, "tensor_model_parallel", False)
        counted[id(shard)] = is_divided or distributed.tensor_parallel_rank() == 0
    # A replicated optimizer has all elements on every data-parallel rank; a sum over these ranks
    # would count each element once a rank.
    groups = {True: distributed.stage_group, False: distributed.tensor_parallel_group}
    numel = torch.tensor(sizes, dtype=torch.float64, device=distributed.device())
    return TensorStatistics(
        tensor_index=tensor_index, counted=counted, numel=numel, group=groups[shares_state]()
    )


def learning_rate(
    optimizer: OptimizerConfig, phase: PhaseConfig, *, run_tokens: int, phase_tokens: int
) -> float:
    """Return the learning rate of the step that starts after `phase_tokens` tokens of the phase.

    `run_tokens`, counted from the first token that this optimizer saw, drives the warm-up. Within a
    phase the rate stays at lr_start, then goes to lr_end over the last lr_decay_tokens. The curve
    "one_minus_sqrt" is end + (start - end) * (1 - sqrt(progress)), as in ModernBERT's
    `src/scheduler.py`; the paper calls it an inverse square root.
    """
    share = phase.lr_start + (phase.lr_end - phase.lr_start) * _progress(phase, phase_tokens)
    if run_tokens < optimizer.warmup_tokens:
        share *= run_tokens / optimizer.warmup_tokens
    return optimizer.lr * share


def _progress(phase: PhaseConfig, phase_tokens: int) -> float:
    """Return the share of the way from lr_start to lr_end that is done, 0 to 1."""
    length = phase.lr_decay_tokens or phase.train_tokens
    done = phase_tokens - (phase.train_tokens - length)
    linear = min(max(done / length, 0.0), 1.0)
    match phase.lr_decay:
        case "linear":
            return linear
        case "one_minus_sqrt":
            return math.sqrt(linear)
        case _:
            assert_never(phase.lr_decay)
