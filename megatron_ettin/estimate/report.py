"""An estimate as text, and as one JSON object."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_ettin.devices import GIB
from megatron_ettin.estimate.plan import Estimate
from megatron_ettin.text_table import text_facts


def as_text(found: Estimate, source_of_rate: str) -> str:
    """Return the estimate as lines; `source_of_rate` says where the tokens per second are from."""
    counted, hardware = found.parameters, found.hardware
    disk_bytes = found.checkpoints * found.checkpoint_bytes
    facts = [
        (
            "parameters",
            f"{counted.total:,}: embedding {counted.embedding:,}, layers "
            f"{counted.layers:,}, head {counted.head:,}",
        ),
        (
            "hardware",
            f"{found.num_devices} x {found.device.name}, {hardware.precision}, "
            f"micro-batch of {hardware.micro_batch_tokens:,} slots",
        ),
        (
            "memory",
            f"{found.total_memory_bytes / GIB:.2f} GiB of "
            f"{found.device.memory_bytes / GIB:.1f} GiB, on the rank that needs most:",
        ),
        *(
            (f"  {part.replace('_', ' ')}", f"{size / GIB:7.2f} GiB")
            for part, size in found.memory_bytes.items()
            if size
        ),
        ("tokens/s", f"{found.tokens_per_s:,.0f} ({source_of_rate})"),
        *(
            (
                f"  {phase.name}",
                f"{phase.tokens:,} tokens, {phase.steps:,} steps, "
                f"{phase.tokens_per_s:,.0f} tokens/s, {phase.hours:,.1f} hours",
            )
            for phase in found.phases
        ),
        ("hours", f"{found.hours:,.1f} for {found.tokens:,} tokens"),
        (
            "checkpoints",
            f"{found.checkpoints:,} of {found.checkpoint_bytes / GIB:.2f} GiB: "
            f"{disk_bytes / GIB:,.1f} GiB",
        ),
    ]
    return "\n".join(text_facts(facts))


def as_json(found: Estimate) -> dict[str, Any]:
    """Return the estimate as one object for json.dumps; sizes in bytes."""
    return {
        "parameters": found.parameters.total,
        "parameters_by_part": dataclasses.asdict(found.parameters),
        "device": found.device.name,
        "num_devices": found.num_devices,
        "micro_batch_tokens": found.hardware.micro_batch_tokens,
        "memory_bytes": {**found.memory_bytes, "total": found.total_memory_bytes},
        "tokens": found.tokens,
        "tokens_per_s": found.tokens_per_s,
        "hours": found.hours,
        "steps": sum(phase.steps for phase in found.phases),
        "checkpoints": found.checkpoints,
        "checkpoint_bytes": found.checkpoint_bytes,
        "disk_bytes": found.checkpoints * found.checkpoint_bytes,
        "phases": [dataclasses.asdict(phase) for phase in found.phases],
    }
