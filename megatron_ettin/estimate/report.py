"""An estimate as text, and as one JSON object."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_ettin.devices import GIB
from megatron_ettin.estimate.plan import Estimate


def as_text(found: Estimate, source_of_rate: str) -> str:
    """Return the estimate as lines; `source_of_rate` says where the tokens per second are from."""
    counted, hardware = found.parameters, found.hardware
    lines = [
        f"parameters      {counted.total:,}: embedding {counted.embedding:,}, layers "
        f"{counted.layers:,}, head {counted.head:,}",
        f"hardware        {found.num_devices} x {found.device.name}, {hardware.precision}, "
        f"micro-batch of {hardware.micro_batch_tokens:,} slots",
        f"memory          {found.total_memory_bytes / GIB:.2f} GiB of "
        f"{found.device.memory_bytes / GIB:.1f} GiB, on the rank that needs most:",
        *(
            f"  {part.replace('_', ' '):<15} {size / GIB:>7.2f} GiB"
            for part, size in found.memory_bytes.items()
            if size
        ),
        f"tokens/s        {found.tokens_per_s:,.0f} ({source_of_rate})",
        *(
            f"  {phase.name:<15} {phase.tokens:,} tokens, {phase.steps:,} steps, "
            f"{phase.tokens_per_s:,.0f} tokens/s, {phase.hours:,.1f} hours"
            for phase in found.phases
        ),
        f"hours           {found.hours:,.1f} for {found.tokens:,} tokens",
        f"checkpoints     {found.checkpoints:,} of {found.checkpoint_bytes / GIB:.2f} GiB: "
        f"{found.checkpoints * found.checkpoint_bytes / GIB:,.1f} GiB",
    ]
    return "\n".join(lines)


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
