"""Measure the attention of global and local layers on packed documents, forward and backward.

python tools/bench_attention.py --models 17m 150m 1b --json

On a GPU: torch's varlen kernel, also with the empty segments that rows have room for; Transformer
Engine's; and how long the host takes to start them in the order of a model's layers.
"""

from __future__ import annotations

import argparse
import json

from benchmarks.model_sizes import SIZES
from megatron_ettin.command_parser import CommandParser


def main() -> None:
    """Measure each model's attention with both masks and report."""
    args = parse_arguments()
    from benchmarks.attention_times import SLOTS, documents, times_of_models, times_table
    from megatron_ettin import distributed

    slots = args.slots or SLOTS[distributed.device().type]
    cu_seqlens = documents(slots, args.seq_length, args.document_tokens)
    for model, attention, times in times_of_models(args.models, cu_seqlens, rounds=args.rounds):
        print("", *times_table(f"{model} {attention}", times), sep="\n", flush=True)
        if args.json:
            found = {"model": model, "attention": attention, "slots": slots, "times": times}
            print(json.dumps(found), flush=True)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=SIZES, default=["17m", "150m", "1b"], metavar="SIZE")
    add("--slots", type=int, help="slots of a micro-batch (CPU 4096, GPU 65536)")
    add("--seq-length", type=int, default=1024, help="slots of a row (1024)")
    add("--document-tokens", type=int, default=200, help="mean tokens of a document (200)")
    add("--rounds", type=int, default=5, help="timed passes (5)")
    add("--json", action="store_true", help="also print a JSON object a model and mask")
    return parser.parse_args()


if __name__ == "__main__":
    main()
