"""Measure the attention of global and local layers on packed documents, forward and backward.

python tools/bench_attention.py --models 17m 150m 1b --json

On a GPU: torch's varlen kernel and Transformer Engine's, each also with the empty segments that
rows have room for, and how long the host takes to start them in the order of a model's layers.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import yaml

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = ("nano", "17m", "32m", "68m", "150m", "400m", "1b")
SLOTS = {"cpu": 4096, "cuda": 2**16}


def main() -> None:
    """Measure each model's attention with both masks and report."""
    args = parse_arguments()
    from megatron_ettin import distributed
    from megatron_ettin.config import HardwareConfig, ModelConfig
    from megatron_ettin.evaluation.attention_times import attention_times, documents
    from megatron_ettin.model.provider import ATTENTION_MASKS

    slots = args.slots or SLOTS[distributed.device().type]
    cu_seqlens = documents(slots, args.seq_length, args.document_tokens)
    report: dict[str, Any] = {"slots": slots}
    with distributed.process_groups(HardwareConfig()):
        for name, attention in itertools.product(args.models, ATTENTION_MASKS):
            model = ModelConfig(**example(name))
            found = attention_times(model, attention, cu_seqlens, rounds=args.rounds)
            report.setdefault(name, {})[attention] = found
            for kernel, times in found.items():
                numbers = "  ".join(f"{key} {value:8.3f}" for key, value in times.items())
                print(f"{name:5} {attention:14} {kernel:38} {numbers}", flush=True)
    if args.json:
        print(json.dumps(report))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=SIZES, default=["17m", "150m", "1b"], metavar="SIZE")
    add("--slots", type=int, help="of a micro-batch (CPU 4096, GPU 65536)")
    add("--seq-length", type=int, default=1024, help="slots of a row (1024)")
    add("--document-tokens", type=int, default=200, help="of a document, on average (200)")
    add("--rounds", type=int, default=20, help="timed passes (20)")
    add("--json", action="store_true", help="end with one JSON object: model, mask, kernel, ms")
    return parser.parse_args()


def example(name: str) -> dict[str, Any]:
    """Return the fields of examples/model/NAME.yaml."""
    fields: dict[str, Any] = yaml.safe_load((EXAMPLES / "model" / f"{name}.yaml").read_text())
    return fields["model"]  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
