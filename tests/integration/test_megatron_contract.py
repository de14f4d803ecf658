"""Parts of Megatron-Core that we rely on: an upgrade that breaks one fails here, in one place."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.core import (
    CheckpointingConfig,
    maybe_load_config,
    save_config,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import utils as transformer_utils
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.utils import _DistWrapper

from megatron_ettin.config import HardwareConfig, ModelConfig
from megatron_ettin.model.provider import transformer_config

CALLS: list[tuple[Callable[..., Any], set[str]]] = [
    (
        parallel_state.initialize_model_parallel,
        {"tensor_model_parallel_size", "pipeline_model_parallel_size"},
    ),
    (parallel_state.get_data_parallel_group, {"with_context_parallel"}),
    (parallel_state.get_tensor_and_data_parallel_group, {"with_context_parallel"}),
    (tensor_parallel.VocabParallelEmbedding, {"init_method", "config", "tp_group"}),
    (
        tensor_parallel.ColumnParallelLinear,
        {"bias", "skip_bias_add", "gather_output", "skip_weight_param_allocation", "tp_group"},
    ),
    (tensor_parallel.vocab_parallel_cross_entropy, {"vocab_parallel_logits", "target"}),
    (tensor_parallel.gather_from_tensor_model_parallel_region, {"group"}),
    (TransformerBlock, {"config", "spec", "pre_process", "post_process"}),
    (
        TransformerBlock.forward,
        {"hidden_states", "attention_mask", "rotary_pos_emb", "packed_seq_params"},
    ),
    (get_num_layers_to_build, {"config", "vp_stage", "pp_rank"}),
    (get_transformer_layer_offset, {"config", "vp_stage", "pp_rank"}),
    (
        schedules.forward_backward_no_pipelining,
        {"forward_step_func", "data_iterator", "model", "num_microbatches", "forward_only"},
    ),
    (
        schedules.forward_backward_pipelining_without_interleaving,
        {"forward_step_func", "data_iterator", "model", "num_microbatches", "forward_only"},
    ),
    (finalize_model_grads, {"model", "num_tokens"}),
    (
        distrib_optimizer.DistributedOptimizer,
        {
            "optimizer",
            "config",
            "grad_scaler",
            "init_state_fn",
            "model_chunks",
            "per_model_buffers",
            "data_parallel_group",
            "data_parallel_group_gloo",
            "data_parallel_group_idx",
            "distributed_optimizer_instance_id",
        },
    ),
    # training/optimizer.py adds moments that an optimizer does not keep to what this returns.
    (
        distrib_optimizer.DistributedOptimizer._get_main_param_and_optimizer_states,
        {"model_param"},
    ),
    (FP32Optimizer, {"optimizer", "config", "init_state_fn"}),
    (
        Float16OptimizerWithFloat16Params,
        {"optimizer", "config", "grad_scaler", "init_state_fn"},
    ),
    (
        dist_checkpointing.save,
        {
            *("sharded_state_dict", "checkpoint_dir", "sharded_strategy"),
            *("async_sharded_save", "validate_access_integrity"),
        },
    ),
    (save_config, {"config", "checkpoint_dir"}),
    (CheckpointingConfig, {"sharded_backend", "sharded_backend_version"}),
    (AsyncRequest, {"async_fn", "async_fn_args", "finalize_fns"}),
    (_DistWrapper.reduce_scatter, {"step", "map_fun", "reduce_fun"}),
    (FileSystemWriter.__init__, {"path", "sync_files", "per_thread_copy_ahead"}),
    (FileSystemWriter.finish, {"metadata", "results"}),
    (dist_checkpointing.load, {"sharded_state_dict", "checkpoint_dir"}),
    (mcore_to_pyt_state_dict, {"state_dict", "is_loading"}),
    (_replace_state_dict_keys_with_sharded_keys, {"sharded_state_dict", "keep_only_main_replica"}),
    (MCoreSavePlanner.__init__, {"dedup_replicated_tensors", "kwargs"}),
    (maybe_load_config, {"checkpoint_dir"}),
    (get_forward_backward_func, set()),
]

FIELDS: list[tuple[type, set[str]]] = [
    (TransformerConfig, {"window_size", "window_attn_skip_freq", "hetereogenous_dist_checkpoint"}),
    (DistributedDataParallelConfig, {"grad_reduce_in_fp32", "use_distributed_optimizer"}),
    (OptimizerConfig, {"optimizer", "lr", "clip_grad", "bf16", "use_distributed_optimizer"}),
    (OptimizerConfig, {"weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "muon_tp_mode"}),
    (PackedSeqParams, {"qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q"}),
    (SelfAttentionSubmodules, {"linear_qkv", "core_attention", "linear_proj"}),
    (TransformerLayerSubmodules, {"input_layernorm", "self_attention", "self_attn_bda", "mlp"}),
    (TransformerBlockSubmodules, {"layer_specs", "layer_norm"}),
]


@pytest.mark.parametrize(("call", "needed"), CALLS, ids=lambda x: getattr(x, "__qualname__", ""))
def test_a_call_takes_what_we_pass(call: Callable[..., Any], needed: set[str]) -> None:
    assert needed <= set(inspect.signature(call).parameters)


@pytest.mark.parametrize(("section", "needed"), FIELDS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_dataclass_has_the_fields_we_set(section: type, needed: set[str]) -> None:
    assert needed <= {field.name for field in dataclasses.fields(section)}


def test_the_names_that_cpu_redirects_exist() -> None:
    for name in (
        "_CUDA_RNG_STATE_TRACKER",
        "_CUDA_RNG_STATE_TRACKER_INITIALIZED",
        "_get_cuda_rng_state",
        "_set_cuda_rng_state",
    ):
        assert hasattr(megatron_random, name)
    assert hasattr(schedules, "torch")
    assert hasattr(transformer_utils, "torch")


def test_a_save_hands_the_tensors_to_the_strategy_and_does_no_more() -> None:
    """`dist_checkpointing.save` calls the `async_save` that shard_saver.py overrides, last."""
    source = inspect.getsource(dist_checkpointing.save)
    assert "sharded_strategy.async_save(sharded_state_dict, checkpoint_dir" in source
    after = source.split("sharded_strategy.async_save(")[1]
    assert "async_request.finalize_fns.append(metadata_finalize_fn)" in after
    assert callable(TorchDistSaveShardedStrategy.async_save)


def test_the_optimizer_asks_these_names_where_step_is_kept() -> None:
    source = inspect.getsource(distrib_optimizer.DistributedOptimizer.state_dict)
    assert "HAVE_APEX_OR_TE" in source
    assert "USING_TE_OPTIMIZER" in source


def test_the_configuration_is_what_we_asked_for() -> None:
    model = ModelConfig(num_layers=4, hidden_size=128, ffn_hidden_size=192, num_attention_heads=2)
    config = transformer_config(model, "bidirectional", HardwareConfig())
    assert config.layernorm_epsilon == 1e-5
    assert config.kv_channels == 64
    assert config.num_query_groups == 2
    assert config.window_attn_skip_freq == [0, 1, 1, 0]
    assert not config.add_bias_linear
    assert config.calculate_per_token_loss
    assert (config.hidden_dropout, config.attention_dropout) == (0.0, 0.0)
