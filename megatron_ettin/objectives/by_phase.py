"""Objectives that change from phase to phase, such as a causal detour on the way to an encoder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_ettin.objectives.base import Batch, Objective
from megatron_ettin.rows import Rows, TokenIds


@dataclass(frozen=True, kw_only=True)
class ByPhase(Objective):
    """One objective, and others in the phases that are named; weights and optimizer go on.

    A model that has been trained by it is one of its last phase's kind.
    """

    objective: Objective
    """Objective of the phases that `by_phase` does not name."""
    by_phase: dict[str, Objective]
    """Objectives by phase name."""

    def __post_init__(self) -> None:
        """Refuse phases within phases."""
        for name, part in {"objective": self.objective, **self.by_phase}.items():
            if isinstance(part, ByPhase):
                raise ValueError(f"objective.{name}: ByPhase holds no further ByPhase")

    def for_phase(self, phase: str) -> Objective:
        """Return the objective of `phase`."""
        return self.by_phase.get(phase, self.objective)

    def make_batch(self, rows: Rows, *, phase: str, mask_seed: int, ids: TokenIds) -> Batch:
        """Return the batch of the phase's objective, with the direction of its attention."""
        objective = self.for_phase(phase)
        batch = objective.make_batch(rows, phase=phase, mask_seed=mask_seed, ids=ids)
        if batch.is_causal is not None:
            return batch
        return dataclasses.replace(batch, is_causal=objective.attention == "causal")

    def scored_share(self, phase: str) -> float:
        """Return that of the phase's objective."""
        return self.for_phase(phase).scored_share(phase)

    def largest_scored_share(self, phase: str) -> float:
        """Return that of the phase's objective."""
        return self.for_phase(phase).largest_scored_share(phase)
