"""An estimate as text, and as one JSON object."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_ettin.devices import GIB
from megatron_ettin.estimate.plan import Estimate, PhaseEstimate
from megatron_ettin.text_table import text_facts


def as_text(estimate: Estimate, source_of_rate: str) -> str:
    """Return the estimate as lines; `source_of_rate` says where the tokens per second are from."""
    counted, hardware = estimate.parameters, estimate.hardware
    disk_bytes = estimate.checkpoints * estimate.checkpoint_bytes
    facts = [
        (
            "parameters",
            f"{counted.total:,}: embedding {counted.embedding:,}, layers "
            f"{counted.layers:,}, head {counted.head:,}",
        ),
        (
            "hardware",
            f"{estimate.num_devices} x {estimate.device.name}, {hardware.precision}, "
            f"micro-batch of {hardware.micro_batch_tokens:,} slots",
        ),
        (
            "memory",
            f"{estimate.total_memory_bytes / GIB:.2f} GiB of "
            f"{estimate.device.memory_bytes / GIB:.1f} GiB, on the rank that needs most:",
        ),
        *(
            (f"  {part.replace('_', ' ')}", f"{size / GIB:7.2f} GiB")
            for part, size in estimate.memory_bytes.items()
            if size
        ),
        ("tokens/s", f"{estimate.tokens_per_s:,.0f} ({source_of_rate})"),
        *(fact for phase in estimate.phases for fact in _phase_facts(phase, estimate)),
        *(("  instead", text) for phase, text in estimate.advice if not phase),
        (
            "hours",
            f"{estimate.hours:,.1f} for {estimate.tokens:,} tokens: "
            f"{estimate.device_hours:,.1f} {_unit(estimate)}-hours",
        ),
        (
            "checkpoints",
            f"{estimate.checkpoints:,} of {estimate.checkpoint_bytes / GIB:.2f} GiB: "
            f"{disk_bytes / GIB:,.1f} GiB",
        ),
    ]
    return "\n".join(text_facts(facts))


def _phase_facts(phase: PhaseEstimate, estimate: Estimate) -> list[tuple[str, str]]:
    """Return the lines of a phase, and what would lose less of its time."""
    numbers = (
        f"{phase.tokens:,} tokens, {phase.steps:,} steps, {phase.tokens_per_s:,.0f} tokens/s, "
        f"{phase.hours:,.1f} hours"
    )
    advice = [("    instead", text) for name, text in estimate.advice if name == phase.name]
    return [(f"  {phase.name}", numbers), ("    step", str(phase.occupancy)), *advice]


def _unit(estimate: Estimate) -> str:
    return "GPU" if estimate.device.kind == "cuda" else "rank"


def as_json(estimate: Estimate) -> dict[str, Any]:
    """Return the estimate as one object for json.dumps; sizes in bytes."""
    return {
        "parameters": estimate.parameters.total,
        "parameters_by_part": dataclasses.asdict(estimate.parameters),
        "device": estimate.device.name,
        "num_devices": estimate.num_devices,
        "micro_batch_tokens": estimate.hardware.micro_batch_tokens,
        "memory_bytes": {**estimate.memory_bytes, "total": estimate.total_memory_bytes},
        "tokens": estimate.tokens,
        "tokens_per_s": estimate.tokens_per_s,
        "hours": estimate.hours,
        "device_hours": estimate.device_hours,
        "steps": sum(phase.steps for phase in estimate.phases),
        "checkpoints": estimate.checkpoints,
        "checkpoint_bytes": estimate.checkpoint_bytes,
        "disk_bytes": estimate.checkpoints * estimate.checkpoint_bytes,
        "phases": [_phase_object(phase) for phase in estimate.phases],
        "advice": [f"{phase}: {text}" if phase else text for phase, text in estimate.advice],
    }


def _phase_object(phase: PhaseEstimate) -> dict[str, Any]:
    """Return a phase's fields, with those of its step beside them."""
    step = phase.occupancy
    return {
        "name": phase.name,
        "tokens": phase.tokens,
        "steps": phase.steps,
        "micro_batches": step.micro_batches,
        "idle_ranks": step.idle_ranks,
        "lost_share": step.lost_share,
        "tokens_per_s": phase.tokens_per_s,
        "hours": phase.hours,
    }
