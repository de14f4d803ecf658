"""Measure single kernels of a layer, of the embedding and of the loss, forward and backward.

python tools/bench_kernels.py --models 17m 150m 1b
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from benchmarks.model_sizes import SIZES
from megatron_ettin.command_parser import CommandParser


def main() -> None:
    """Measure every kernel; print each as soon as it is known."""
    args = parse_arguments()
    from benchmarks.attention_times import SLOTS
    from benchmarks.kernel_times import times_of_models
    from megatron_ettin import distributed

    rows = args.rows or SLOTS[distributed.device().type]
    for found in times_of_models(args.models, rows, rounds=args.rounds):
        if args.json:
            print(json.dumps({"rows": rows, **dataclasses.asdict(found)}), flush=True)
        else:
            label = f"{found.model} ({found.channels} channels)"
            print(f"{label:20} {found.kernel:40} {found.milliseconds:9.3f} ms", flush=True)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=SIZES, default=["17m", "150m", "1b"], metavar="SIZE")
    add("--rows", type=int, help="slots of a micro-batch (CPU 4096, GPU 65536)")
    add("--rounds", type=int, default=10, help="timed passes (10)")
    add("--json", action="store_true", help="print JSON objects, one a kernel, in place of text")
    return parser.parse_args()


if __name__ == "__main__":
    main()
