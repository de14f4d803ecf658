"""Build the parts of a run from its configuration, each in one function."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ettin import checkpoint, checkpoint_files, distributed
from megatron_ettin import config as configuration
from megatron_ettin.checkpoint import RunState
from megatron_ettin.checkpoint_files import CheckpointError
from megatron_ettin.config import RunConfig
from megatron_ettin.data.corpus_tokenizer import require_tokenizer_of_weights
from megatron_ettin.data.loader import Loader
from megatron_ettin.data.orders import open_held_out_order
from megatron_ettin.model.ettin_model import EttinModel
from megatron_ettin.model.provider import build_model
from megatron_ettin.objectives import attentions
from megatron_ettin.order import OrderSpec, SampleOrder
from megatron_ettin.order.interventions import read_interventions
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.publication import publish_text, remove_leftovers
from megatron_ettin.training import rotary_bases
from megatron_ettin.training.attention_choice import layers_of_transformer_engine
from megatron_ettin.training.keeper import open_keeper
from megatron_ettin.training.loop import Training
from megatron_ettin.training.metrics import Reporter
from megatron_ettin.training.micro_batch import ForwardBackward
from megatron_ettin.training.optimizer import build_optimizer
from megatron_ettin.training.rank_times import RankTimes
from megatron_ettin.training.recorder import open_recorder
from megatron_ettin.training.saving import Saver
from megatron_ettin.training.signals import StopSignals
from megatron_ettin.training.start_checks import (
    check_same_order,
    check_same_run,
    plans_other_rows,
)
from megatron_ettin.training.trouble import Watch
from megatron_ettin.training.validation import Validation
from megatron_ettin.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


def starting_state(config: RunConfig, order: SampleOrder) -> RunState:
    """Return the state at the start: of the newest checkpoint with `resume`, else of a new run.

    `choose_checkpoint` has compared its files.

    Raises:
        CheckpointError: run_dir holds a run already, or a run with another order; or a new run's
            `initialize_from` holds no weights for this model.
        MixedTokenizersError: those weights were trained with another tokenizer.
    """
    newest = RunFolder(Path(config.run_dir)).newest_checkpoint()
    if newest is None:
        digest = order.spec.tokenizer_sha256
        return RunState(
            tokenizer_sha256=digest, initialized_from=_source_of_weights(config, digest)
        )
    if not config.checkpoint.resume:
        raise CheckpointError(
            f"{config.run_dir}: holds checkpoints of a run already ({newest.name}): give "
            f"--checkpoint.resume true to go on from there, or another run_dir"
        )
    check_same_run(config, newest)
    state = checkpoint.read_state(newest)
    check_same_order(config, order.spec, newest, state)
    return state


def _source_of_weights(config: RunConfig, tokenizer_sha256: str) -> dict[str, str | None] | None:
    """Check that a new run's first weights can be loaded; return their folder and digest."""
    given = config.checkpoint.initialize_from
    if given is None:
        return None
    files = checkpoint_files.check_files(Path(given)) if config.checkpoint.check_files else None
    checkpoint.check_architecture(Path(given), config.model)
    weights_sha256 = checkpoint.read_state(Path(given)).tokenizer_sha256
    require_tokenizer_of_weights(config, weights_sha256, tokenizer_sha256)
    return {"checkpoint": given, "files_sha256": None if files is None else files.sha256}


def build_training(config: RunConfig, order: SampleOrder, state: RunState) -> Training:
    """Build model, optimizer, loaders and reports for this rank; fill in RoPE bases."""
    config = rotary_bases.resolve(config, order.spec, state)
    # First: its lock refuses a run_dir in which another process trains, before anything is written.
    recorder = open_recorder(
        config,
        order.spec,
        state,
        ids=order.ids,
        is_amended=bool(state.step) and plans_other_rows(order.spec, state),
    )
    watch = open_watch(config, order.spec, state)
    # The batches of a run with several directions name theirs.
    attention, *_ = attentions(config.objective, [phase.name for phase in config.phases])
    loader = build_loader(config, order)
    by_engine = layers_of_transformer_engine(config, attention, loader, state.g)
    stage = build_model(config.model, attention, config.hardware, config.seeds, by_engine)
    ddp = DistributedDataParallel(
        stage.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            # A single rank has nothing to shard, and would only copy gradients and weights.
            use_distributed_optimizer=config.hardware.use_distributed_optimizer
            and distributed.data_parallel_group().size() > 1,
        ),
        stage,
    )
    # A run that has ended already writes no record, so its ledger could not bind new files.
    if state.g < order.num_rows and distributed.is_main_rank():
        _remove_leftovers(RunFolder(Path(config.run_dir)))
        _write_run_files(config, order)
    optimizer = build_optimizer(ddp, config.optimizer, config.hardware)
    folder = RunFolder(Path(config.run_dir))
    reporter = Reporter(config, order.spec, state, recorder)
    keeper = open_keeper(config, reporter)
    return Training(
        config=config,
        stage=stage,
        ddp=ddp,
        forward_backward=_choose_forward_backward(config, stage, reporter.times),
        optimizer=optimizer,
        loader=loader,
        validation=_build_validation(config),
        reporter=reporter,
        recorder=recorder,
        watch=watch,
        keeper=keeper,
        saver=Saver(config, stage, optimizer, recorder=recorder, reporter=reporter, keeper=keeper),
        stop=StopSignals(folder.stop),
        watchdog=Watchdog(folder.hangs, config.trouble.hang_seconds),
    )


def open_watch(config: RunConfig, spec: OrderSpec, state: RunState) -> Watch:
    """Return a watch that knows all decisions in the ledger; the ledger is open, so none moves."""
    ledger = RunFolder(Path(config.run_dir)).ledger
    decided = read_interventions(ledger) if distributed.is_main_rank() else []
    return Watch(
        config.trouble,
        config.data.skip_rows,
        spec,
        distributed.broadcast(decided),
        saved_step=state.step,
    )


def _choose_forward_backward(
    config: RunConfig, stage: EttinModel, times: RankTimes
) -> ForwardBackward:
    """Return the function that runs a step's passes: Megatron-Core's, or a replay of graphs."""
    if config.hardware.cuda_graphs:
        from megatron_ettin.training.graphs import GraphedForwardBackward

        return GraphedForwardBackward(stage, finalize=times.finalize)
    stage.config.finalize_model_grads_func = times.finalize
    forward_backward: ForwardBackward = get_forward_backward_func()
    return forward_backward


def restore(run: Training, state: RunState) -> RunState:
    """Load the starting weights, if there are any; return `state` with this run's order."""
    if state.step:
        folder = RunFolder(Path(run.config.run_dir)).checkpoint(state.step)
        checkpoint.load(folder, run.stage, run.optimizer, run.config.model)
        logger.info("resumed from %s at row %d", folder, state.g)
    elif run.config.checkpoint.initialize_from is not None:
        folder = Path(run.config.checkpoint.initialize_from)
        checkpoint.load(folder, run.stage, None, run.config.model)
        run.optimizer.reload_model_params()
        logger.info("weights from %s, fresh optimizer", folder)
    spec = run.loader.order.spec
    return dataclasses.replace(
        state, phase_ids=tuple(spec.phase_ids()), phase_ends=tuple(spec.phase_ends())
    )


def build_loader(config: RunConfig, order: SampleOrder) -> Loader:
    """Return this rank's loader of the order's rows."""
    rank, size = distributed.data_parallel()
    return Loader.of_run(config, order, data_parallel_rank=rank, data_parallel_size=size)


def _build_validation(config: RunConfig) -> Validation | None:
    if not config.data.validation:
        return None
    return Validation(
        loader=build_loader(config, open_held_out_order(config)),
        num_rows=config.validation.num_rows,
    )


def _remove_leftovers(folder: RunFolder) -> None:
    """Remove what killed processes of this run left; the ledger's lock excludes live ones."""
    for path in (folder.config, folder.order, folder.metrics, folder.wandb_id):
        remove_leftovers(path)


def _write_run_files(config: RunConfig, order: SampleOrder) -> None:
    """Write run_dir/config.yaml and run_dir/order.json."""
    folder = RunFolder(Path(config.run_dir))
    folder.path.mkdir(parents=True, exist_ok=True)
    publish_text(folder.config, configuration.to_yaml(config))
    publish_text(folder.order, order.spec.to_json())
