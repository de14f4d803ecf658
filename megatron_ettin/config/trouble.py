"""The section `trouble` of a run: what it does by itself about a step that goes wrong."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ettin.config.checks import require_positive


@dataclass(frozen=True, kw_only=True)
class TroubleConfig:
    """Answers to steps that go wrong."""

    hang_seconds: float | None = None
    """Longest time from one step to the next, in seconds; a rank that takes longer writes the
    stacks of its threads into run_dir/hangs and ends with code 1, so that torchrun restarts the
    run. Give several times what a step takes. The first step of a phase, validation and saving may
    take 30 minutes. Without it a rank waits that long for another."""

    def __post_init__(self) -> None:
        """Refuse a time that is not positive."""
        if self.hang_seconds is not None:
            require_positive("trouble", "hang_seconds", self.hang_seconds)
