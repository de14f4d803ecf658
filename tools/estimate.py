"""Estimate what a run will need: memory by part, hours, steps, checkpoints (docs/estimate.md)."""

import dataclasses
import json
from collections.abc import Sequence

from megatron_ettin.devices import GIB, device
from megatron_ettin.estimate.command_line import parse
from megatron_ettin.estimate.plan import estimate
from megatron_ettin.estimate.report import as_json, as_text


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, estimate, print; what cannot fit or be laid out ends in one message, exit code 1."""
    try:
        question = parse(arguments)
        used = device(question.device)
        if question.device_memory_gib is not None:
            memory = int(question.device_memory_gib * GIB)
            used = dataclasses.replace(used, memory_bytes=memory)
        estimated = estimate(
            question.config,
            used,
            num_devices=question.num_devices,
            fill=question.fill,
            tokens_per_s=question.tokens_per_s,
            choose_micro_batch=question.choose_micro_batch,
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    if question.tokens_per_s is not None:
        source = "as given"
    elif used.kind == "cpu":
        source = "this machine's matrix products x the share that was reached elsewhere"
    else:
        source = "from the share of the peak that the published runs reached on H100"
    print(as_text(estimated, source))
    if question.as_json:
        print(json.dumps(as_json(estimated)))


if __name__ == "__main__":
    main()
