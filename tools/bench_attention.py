"""Measure the attention of global and local layers on packed documents, forward and backward.

python tools/bench_attention.py --models 17m 150m 1b --json

On a GPU: torch's varlen kernel and Transformer Engine's, each also with the empty segments that
rows have room for, and how long the host takes to start them in the order of a model's layers.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.model_sizes import SIZES
from megatron_ettin.command_parser import CommandParser


def main() -> None:
    """Measure each model's attention with both masks and report."""
    args = parse_arguments()
    from benchmarks.attention_times import SLOTS, documents, times_of_models, times_table
    from megatron_ettin import distributed

    slots = args.slots or SLOTS[distributed.device().type]
    cu_seqlens = documents(slots, args.seq_length, args.document_tokens)
    report: dict[str, Any] = {"slots": slots}
    for model, attention, times in times_of_models(args.models, cu_seqlens, rounds=args.rounds):
        report.setdefault(model, {})[attention] = times
        print("", *times_table(f"{model} {attention}", times), sep="\n", flush=True)
    if args.json:
        print(json.dumps(report))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=SIZES, default=["17m", "150m", "1b"], metavar="SIZE")
    add("--slots", type=int, help="slots of a micro-batch (CPU 4096, GPU 65536)")
    add("--seq-length", type=int, default=1024, help="slots of a row (1024)")
    add("--document-tokens", type=int, default=200, help="mean tokens of a document (200)")
    add("--rounds", type=int, default=20, help="timed passes (20)")
    add("--json", action="store_true", help="end with one JSON object: model, mask, kernel, ms")
    return parser.parse_args()


if __name__ == "__main__":
    main()
