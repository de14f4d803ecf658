"""Train one run under several parallel layouts; compare losses and final weights.

python tools/compare_layouts.py --output runs/layouts --config A.yaml --config B.yaml ...
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm


def main() -> None:
    """Run every layout and print how far its losses and weights are from the first one's."""
    args = parse_arguments()
    from megatron_ettin.evaluation.layouts import (
        LAYOUTS,
        Curve,
        final_weights,
        largest_weight_difference,
        run_layout,
    )

    if unknown := set(args.layouts) - set(LAYOUTS):
        raise SystemExit(f"error: no layout {sorted(unknown)}; there are {sorted(LAYOUTS)}")
    curves: dict[str, Curve] = {}
    for name in tqdm(args.layouts, desc="layouts", disable=None):
        run_dir = args.output / name
        if run_dir.exists():
            raise SystemExit(f"error: {run_dir} exists; remove it or give another --output")
        try:
            curves[name] = run_layout(
                LAYOUTS[name], [f"--config={c}" for c in args.config], run_dir
            )
        except RuntimeError as error:
            raise SystemExit(f"error: {error}") from None
    first = args.layouts[0]
    weights = final_weights(args.output / first)
    print(
        f"{'layout':20} processes  steps  last loss  largest relative difference of a\n"
        f"{'':48} loss  tensor at the end  token digest"
    )
    worst = 0.0
    for name, curve in curves.items():
        loss = curve.largest_relative_difference(curves[first])
        tensor, _ = largest_weight_difference(final_weights(args.output / name), weights)
        worst = max(worst, loss, tensor)
        same = "same" if curve.token_digest == curves[first].token_digest else "DIFFERENT"
        print(
            f"{name:20} {LAYOUTS[name].processes:9}  {len(curve.losses):5}  "
            f"{curve.losses[-1]:9.6f}  {loss:8.1e}  {tensor:17.1e}  {same}"
        )
    same_tokens = len({curve.token_digest for curve in curves.values()}) == 1
    if worst > args.tolerance or not same_tokens:
        sys.exit(f"error: layouts differ by more than {args.tolerance:.0e}")


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", action="append", required=True, help="YAML of the run, as for pretrain; repeat")
    add("--output", type=Path, required=True, help="folder for the runs")
    layouts = "of megatron_ettin/evaluation/layouts.py; default: tp1 tp2 pp2 dp2"
    add("--layouts", nargs="+", default=["tp1", "tp2", "pp2", "dp2"], help=layouts)
    add("--tolerance", type=float, default=1e-5, help="largest relative difference allowed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
