"""Predict the passes of a micro-batch on a GPU, by counting what the model would launch there.

python tools/predict_step.py --models 17m 150m --json

Needs no GPU. The rates are assumptions (benchmarks/step_prediction.py), the times estimates.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from benchmarks.model_sizes import SIZES
from megatron_ettin.command_parser import CommandParser


def main() -> None:
    """Predict each model's passes with both masks and report."""
    args = parse_arguments()
    from benchmarks.step_prediction import GpuRates, predict, prediction_table
    from megatron_ettin import distributed
    from megatron_ettin.config import HardwareConfig
    from megatron_ettin.model.provider import ATTENTION_MASKS

    rates = GpuRates(bytes_per_second=1e12 * args.bandwidth_tb_s, matmul_flops=1e12 * args.tflops)
    with distributed.process_groups(HardwareConfig()):
        found = {
            (size, attention): predict(size, attention, args.slots, rates)
            for size in args.models
            for attention in ATTENTION_MASKS
        }
    print(*prediction_table(found), sep="\n")
    if args.json:
        report = {" ".join(key): dataclasses.asdict(value) for key, value in found.items()}
        print(json.dumps(report))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=SIZES, default=["17m", "150m", "1b"], metavar="SIZE")
    add("--slots", type=int, default=65_536, help="slots of a micro-batch (65536)")
    add("--bandwidth-tb-s", type=float, default=3.9, help="terabytes per second of memory (3.9)")
    add("--tflops", type=float, default=600.0, help="10^12 operations per second of matmuls (600)")
    add("--json", action="store_true", help="end with one JSON object by model and mask")
    return parser.parse_args()


if __name__ == "__main__":
    main()
