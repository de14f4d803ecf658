"""Train one run under several parallel layouts; compare losses and final weights.

python tools/compare_layouts.py --output runs/layouts --config A.yaml --config B.yaml ...
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from megatron_ettin.command_parser import CommandParser


def main() -> None:
    """Run every layout and print how far its losses and weights are from the first one's."""
    args = parse_arguments()
    from megatron_ettin.evaluation.layouts import LAYOUTS, distance_table, distances, run_layout

    if unknown := set(args.layouts) - set(LAYOUTS):
        raise SystemExit(f"error: no layout {sorted(unknown)}; there are {sorted(LAYOUTS)}")
    arguments = [f"--config={config}" for config in args.config]
    run_dirs, curves = {name: args.output / name for name in args.layouts}, {}
    for name, run_dir in tqdm(run_dirs.items(), desc="layouts", disable=None):
        if run_dir.exists():
            raise SystemExit(f"error: {run_dir} exists; remove it or give another --output")
        try:
            curves[name] = run_layout(LAYOUTS[name], arguments, run_dir)
        except RuntimeError as error:
            raise SystemExit(f"error: {error}") from None
    by_layout = distances(run_dirs, curves)
    print(*distance_table(curves, by_layout), sep="\n")
    worst = max(max(distance.loss, distance.weight) for distance in by_layout.values())
    if worst > args.tolerance or not all(each.has_same_tokens for each in by_layout.values()):
        sys.exit(f"error: layouts differ by more than {args.tolerance:.0e}")


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", action="append", required=True, help="YAML of the run, as for pretrain; repeat")
    add("--output", type=Path, required=True, help="folder for the runs")
    layouts = "names in megatron_ettin/evaluation/layouts.py; default: tp1 tp2 pp2 dp2"
    add("--layouts", nargs="+", default=["tp1", "tp2", "pp2", "dp2"], help=layouts)
    add("--tolerance", type=float, default=1e-5, help="largest relative difference allowed (1e-5)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
