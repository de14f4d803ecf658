"""Write what a run was fed, step by step, in the layout of the published Ettin order."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.queries.answer import add_shared_arguments, show
from megatron_ettin.queries.ettin_card import ExportedFolder
from megatron_ettin.queries.export_ettin import export_ettin
from megatron_ettin.queries.recorded_run import open_run

EXAMPLE = "--layout ettin --run runs/encoder --output exported"
LAYOUTS = {"ettin": export_ettin}


@dataclass(frozen=True, kw_only=True)
class Export:
    """What lies in the output folder now."""

    run: str
    output: str
    layout: str
    files: int
    files_kept: int
    """Those that an earlier call had written."""
    rows: int
    tokens: int
    folders: list[ExportedFolder]
    notes: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add_shared_arguments(parser, f"export {EXAMPLE}")
    add = parser.add_argument
    add("--layout", choices=[*LAYOUTS], required=True, help="ettin: a folder a checkpoint")
    add("--output", type=Path, required=True, metavar="DIR", help="new, or of a stopped export")
    start = "checkpoint, by name or step; default: 0, the start"
    add("--from", dest="begin", default="0", metavar="CKPT", help=start)
    add("--to", dest="end", metavar="CKPT", help="checkpoint; default: the last one")


def run(args: argparse.Namespace) -> int:
    """Write the export and print what lies in its folder."""
    opened = open_run(args.run)
    begin = opened.checkpoint(args.begin)
    if args.end is None and not opened.checkpoints:
        raise ValueError(f"{args.run}: has no checkpoint yet, and the layout is by checkpoints")
    end = opened.checkpoints[-1] if args.end is None else opened.checkpoint(args.end)
    folders = LAYOUTS[args.layout](opened, args.output, begin, end)
    left = opened.steps_done - end.step
    notes = [f"the {left} steps after {end.name} are not part of it"] if left else []
    answer = Export(
        run=str(args.run),
        output=str(args.output),
        layout=args.layout,
        files=sum(folder.files for folder in folders),
        files_kept=sum(folder.files_kept for folder in folders),
        rows=sum(folder.rows for folder in folders),
        tokens=sum(folder.tokens for folder in folders),
        folders=folders,
        notes=notes,
    )
    return show(answer, args)
