"""Build the row plans of a run, and report how its documents fill the rows."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ettin import native
from megatron_ettin.config import RunConfig, parse_args
from megatron_ettin.data.orders import open_order
from megatron_ettin.order import Order, OrderSpec, PhaseSpec
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.answer import show
from megatron_ettin.queries.recorded_run import open_run


@dataclass(frozen=True, kw_only=True)
class PoolReport:
    """Rows of one source in one phase, and their documents."""

    phase: str
    source: str
    pack: str
    seq_length: int
    kept: int
    """Documents that the rows hold."""
    cut: int
    """Documents cut into several pieces."""
    dropped: int
    """Documents left out: empty, or shorter than min_doc_tokens."""
    dropped_tokens: int
    rows: int
    """Rows of one epoch."""
    tokens: int
    """Tokens of one epoch, special tokens included."""
    padding: int
    """Empty slots of one epoch."""
    fill: float
    """Share of slots in use: tokens / (tokens + padding)."""
    epochs: float
    """Epochs drawn at the end of the phase, those of earlier phases included."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Plans of a run, with one entry per phase and source."""

    order_id: str
    rows: int
    """Rows of the run."""
    tokens: int
    """Expected tokens of the run: for each source, its mean tokens per row times the rows drawn."""
    plan_bytes: int
    """Size of all plan files; a plan that two phases share counts once."""
    figure: str | None
    pools: list[PoolReport]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.epilog = "example: python tools/order.py plan --config model.yaml data.yaml"
    which = parser.add_mutually_exclusive_group(required=True).add_argument
    config = "YAML files of a run that has not begun; later files override earlier ones"
    which("--config", type=Path, nargs="+", metavar="YAML", help=config)
    which("--run", type=Path, metavar="DIR", help="run_dir of a run")
    figure = "write histograms of tokens and pieces per row"
    parser.add_argument("--figure", type=Path, metavar="PNG", help=figure)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def print_answer(args: argparse.Namespace) -> int:
    """Print the answer; return 0."""
    recorded = None
    if args.run is not None:
        config = open_run(args.run, must_match=False).config_for("row plans")
        recorded = RunFolder(args.run).read_order(check_ids=False)
    else:
        # No plan depends on these two, and the files of a run may leave them to its command line.
        words = ["--objective", "CausalLM", "--run_dir", "none"]
        for path in args.config:
            words += ["--config", str(path)]
        config = parse_args(words)
    return show(build_plans(config, recorded=recorded, figure=args.figure), args)


def build_plans(
    config: RunConfig, *, recorded: OrderSpec | None = None, figure: Path | None = None
) -> Plan:
    """Build all missing plans, and report on all of them; `recorded` is the order of a run.

    Raises:
        ValueError, OSError: anything that would also stop the run before its first step.
    """
    order = open_order(config, recorded)
    if figure is not None:
        from megatron_ettin.queries.plan_figure import write_figure

        write_figure(order, figure)
    phases = order.spec.phases
    return Plan(
        order_id=order.spec.order_id,
        rows=order.num_rows,
        tokens=sum(_expected_tokens(phase) for phase in phases),
        plan_bytes=sum(path.stat().st_size for path in order.plan_paths()),
        figure=None if figure is None else str(figure),
        pools=[report for index in range(len(phases)) for report in _reports(order, index)],
    )


def _reports(order: Order, phase_index: int) -> list[PoolReport]:
    phase = order.spec.phases[phase_index]
    drawn = _drawn(phase)
    reports = []
    for source_index, (pool, rows) in enumerate(order.plans(phase_index)):
        slots = rows.num_rows * phase.seq_length
        reports.append(
            PoolReport(
                phase=phase.name,
                source=pool.source,
                pack=phase.pack,
                seq_length=phase.seq_length,
                kept=rows.num_documents,
                cut=rows.cut_documents,
                dropped=rows.dropped_documents,
                dropped_tokens=rows.dropped_tokens,
                rows=rows.num_rows,
                tokens=rows.num_tokens,
                padding=slots - rows.num_tokens,
                fill=rows.num_tokens / slots,
                epochs=(pool.drawn + drawn[source_index]) / rows.num_rows,
            )
        )
    return reports


def _drawn(phase: PhaseSpec) -> list[int]:
    """Return how many rows of each pool a phase draws (docs/order.md, section 4)."""
    quotas = [pool.quota for pool in phase.pools]
    periods, rest = divmod(phase.num_rows, sum(quotas))
    sources, _ = native.blend_table(quotas)
    last = np.bincount(sources[:rest], minlength=len(quotas))
    return [periods * quota + count for quota, count in zip(quotas, last.tolist(), strict=True)]


def _expected_tokens(phase: PhaseSpec) -> int:
    tokens = (
        count * pool.tokens / pool.rows
        for pool, count in zip(phase.pools, _drawn(phase), strict=True)
    )
    return round(sum(tokens))
