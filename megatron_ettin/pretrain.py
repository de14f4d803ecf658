"""Pre-train an encoder or a decoder: `torchrun -m megatron_ettin.pretrain --config ...`.

The table of contents of a run: configuration -> process groups -> order and loader -> model ->
optimizer -> checkpoint -> loop. Heavy imports come after the configuration has been accepted.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ettin.config import RunConfig, parse_args, to_yaml
from megatron_ettin.ending import end_with_launcher, fail

if TYPE_CHECKING:
    from megatron_ettin.checkpoint import RunState
    from megatron_ettin.order import SampleOrder

logger = logging.getLogger(__name__)


def main() -> None:
    """Run the configuration of the command line; an error ends in one message and exit code 1.

    The message of an error in the input names the input; any other error prints its traceback.
    """
    # First, so that no launcher can go before the kernel knows: imports take seconds.
    end_with_launcher()
    try:
        config = parse_args()
        _set_up_logging()
        # The imports take seconds.
        logger.info(
            "%s, %s tokens, into %s: loading torch and Megatron-Core",
            type(config.objective).__name__,
            f"{sum(phase.train_tokens for phase in config.phases):,}",
            config.run_dir,
        )
        code = pretrain(config)
    except (ValueError, OSError) as error:
        fail(f"error: {error}")
    except Exception:
        fail(traceback.format_exc())
    gc.freeze()  # else the interpreter's end looks through all objects of torch: 0.9 CPU seconds
    sys.exit(code)


def pretrain(config: RunConfig) -> int:
    """Train `config` to its end, or from its newest checkpoint with `checkpoint.resume`.

    Returns:
        The exit code: 0, or that of the signal that ended the run before.
    """
    from megatron_ettin.megatron_import import import_megatron_core

    import_megatron_core()
    from megatron_ettin import distributed
    from megatron_ettin.data.corpus_tokenizer import require_one_tokenizer
    from megatron_ettin.data.orders import open_order
    from megatron_ettin.estimate.plan import checkpoint_bytes, num_checkpoints
    from megatron_ettin.model.backend import choose_backend
    from megatron_ettin.order.ledger.lock import refuse_second_run
    from megatron_ettin.order.run_folder import RunFolder
    from megatron_ettin.training import precision, set_up, start_checks
    from megatron_ettin.training.host_report import check_hosts
    from megatron_ettin.training.optimizer import require_packages
    from megatron_ettin.training.start_summary import log_summary
    from megatron_ettin.training.starting_checkpoint import choose_checkpoint

    require_packages(config.optimizer)
    choose_backend(config.model, config.hardware)  # fail fast on an unsupported backend
    with distributed.process_groups(config.hardware):
        distributed.require_equal("the configuration", to_yaml(config))
        # The order counts: cheap refusals first, then the measurement of `auto`, then the corpora,
        # whose plans may take minutes to build, and the model last.
        start_checks.check_outputs(config)
        if distributed.is_main_rank():
            refuse_second_run(RunFolder(Path(config.run_dir)).ledger)
        hosts = check_hosts(
            config,
            checkpoint_bytes=checkpoint_bytes(config),
            num_checkpoints=num_checkpoints(config, [p.train_tokens for p in config.phases]),
        )
        choose_checkpoint(config)  # all hosts see the same run folder
        config = precision.resolve(config)
        require_one_tokenizer(config)
        order = open_order(config, RunFolder(Path(config.run_dir)).begun_order())
        start_checks.check_held_out(config)
        state = set_up.starting_state(config, order)
        log_summary(config, order, state, hosts)
        going_back = dataclasses.replace(
            config, checkpoint=dataclasses.replace(config.checkpoint, resume=True)
        )
        while (exit_code := train_from(config, order, state)) is None:
            gc.collect()  # the weights that were left, before they are built anew
            choose_checkpoint(going_back)
            state = set_up.starting_state(going_back, order)
    return exit_code


def train_from(config: RunConfig, order: SampleOrder, state: RunState) -> int | None:
    """Train from `state` on, to the end or to a request to stop.

    Returns:
        The exit code, as `pretrain` does; None if the run has to go back to its newest checkpoint.
    """
    from megatron_ettin import distributed
    from megatron_ettin.training import set_up
    from megatron_ettin.training.loop import train
    from megatron_ettin.training.signals import StopRequest

    run = set_up.build_training(config, order, state)
    state = set_up.restore(run, state)
    with run.stop, run.watchdog:
        with run.reporter, run.keeper:
            state = train(run, state)
            request = run.stop.request if state.g < order.num_rows else StopRequest.NONE
            if run.watch.goes_back and request is StopRequest.NONE:
                return None
            run.reporter.report_end(
                state, stopped_by=request.reason, stop_seconds=run.stop.seconds_since_asked
            )
            run.watchdog.expect_long_work()
        if request.exit_code:
            # torchrun ends the other ranks as soon as one is gone.
            distributed.barrier()
    return request.exit_code


def _set_up_logging() -> None:
    is_main = os.environ.get("RANK", "0") == "0"
    # Megatron-Core reports every bucket, and warns of missing packages and of its own defaults.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    # Megatron-Core calls these by the names that torch 2.13 replaces; torch's wrapper warns.
    warnings.filterwarnings(
        "ignore",
        message=r"`torch\.distributed\.\w+_tensor` is deprecated",
        category=FutureWarning,
        module=r"torch\.distributed\.c10d_logger",
    )
    logging.basicConfig(
        level=logging.INFO if is_main else logging.ERROR,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )


if __name__ == "__main__":
    main()
