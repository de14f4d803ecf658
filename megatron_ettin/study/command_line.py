"""Command line of tools/study.py."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_ettin.command_parser import CommandParser

#: Inherited by the processes that a study starts. Threads that wait for each other sleep
#: (examples/quickstart.sh says why), and Megatron-Core's warnings of missing packages are quiet.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "PYTHONWARNINGS": "ignore",
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(
        description="Train the arms of a study, evaluate all models, draw one page (docs/study.md)."
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE", help="YAML (examples/study)")
    add("--plan", action="store_true", help="print stages, time and disk, and stop")
    add("--list", action="store_true", help="print the names of the stages, one a line, and stop")
    only = "run these stages alone: patterns of a shell, such as 'evaluate/*/reviews/*'"
    add("--only", nargs="+", default=[], metavar="PATTERN", help=only)
    without = "leave these tasks out, for example because their data is not at hand"
    add("--without", nargs="+", default=[], metavar="TASK", help=without)
    budget = "training tokens of each arm with new weights, in place of train_tokens"
    add("--budget", type=int, metavar="TOKENS", help=budget)
    add("--output", metavar="DIR", help="folder of the study, in place of the one in FILE")
    return parser.parse_args(arguments)


def study_command(options: argparse.Namespace) -> int:
    """Plan or run what the options ask for; return the exit code.

    Raises:
        ValueError, OSError: an input cannot be used; nothing has run yet.
    """
    from megatron_ettin.evaluation.task_file import read_tasks
    from megatron_ettin.study.arms import Study
    from megatron_ettin.study.config import load_study
    from megatron_ettin.study.plan import all_stages, as_text, check_inputs, choose, make_plan
    from megatron_ettin.study.runner import Runner

    changes = {"train_tokens": options.budget, "output": options.output}
    config = load_study(options.config, **{k: v for k, v in changes.items() if v is not None})
    study = Study(config)
    tasks = read_tasks(Path(config.evaluation), without=options.without)
    every = all_stages(study, tasks, options.config)
    stages = choose(every, options.only)
    if options.list:
        print(*(stage.name for stage in stages), sep="\n")
        return 0
    check_inputs(stages)
    plan = make_plan(study, stages)
    print(*as_text(plan), sep="\n", flush=True)
    if options.plan:
        return 0
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    began = time.monotonic()
    runner = Runner(
        every=every,
        num_devices=config.num_devices,
        planned_seconds={name: entry.seconds for name, entry in plan.to_do.items()},
        estimated_seconds={name: e.estimated.seconds for name, e in plan.to_do.items()},
    )
    runner.run(stages)
    print(f"took {(time.monotonic() - began) / 60:.1f} minutes (planned {plan.seconds / 60:.1f})")
    print(*runner.report.as_text(), sep="\n")
    return 1 if runner.report.failed or runner.report.skipped else 0
