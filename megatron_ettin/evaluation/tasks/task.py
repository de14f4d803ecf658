"""Base class of the tasks: what a comparison needs to know about any of them."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from megatron_ettin.evaluation.model import Model
from megatron_ettin.evaluation.scores import Score

Family = Literal["classification", "retrieval", "generation", "minimal pairs", "bias"]


@dataclass(frozen=True, kw_only=True)
class TaskWork:
    """Tokens that a measurement takes a model through, and time that does not depend on a model."""

    forward_tokens: int = 0
    """Tokens of forward passes."""
    trained_tokens: int = 0
    """Tokens of forward and backward passes."""
    fixed_seconds: float = 0.0
    """Seconds of imports and of work outside the model."""


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Scores of a model, and what was chosen or noticed while they were measured."""

    scores: Mapping[str, Score]
    """By name; the first one stands for the task in figures. A score is of one seed."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """JSON values for the reader: the learning rate that was chosen, samples, counts."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A way of asking models something, configured by its fields."""

    family: ClassVar[Family]
    seeds: Sequence[int] = (0,)
    """Seeds of repeated measurements. A task without randomness has one."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Return the local data files that the scores depend on."""

    @abstractmethod
    def check(self) -> None:
        """Read the data as far as needed to know that it can be used.

        Raises:
            ValueError, OSError: data is missing or malformed; the message names file and line.
        """

    def refusal(self, model: Model) -> str | None:
        """Return why a model cannot be measured, or None."""
        return None

    @abstractmethod
    def work(self, model: Model) -> TaskWork:
        """Estimate the work of `measure` for one seed; the data has been checked."""

    @abstractmethod
    def measure(self, model: Model, *, seed: int, scratch: Path) -> TaskScores:
        """Measure a model.

        `scratch` is a folder that survives an interruption: a task may keep finished parts there
        and find them again. It is removed when the result is on disk.
        """

    def settings(self) -> dict[str, Any]:
        """Return the class and the fields but seeds, as JSON: what a result depends on."""
        fields = {**dataclasses.asdict(self), "class": type(self).__name__}
        del fields["seeds"]
        settings: dict[str, Any] = json.loads(json.dumps(fields, default=str))
        return settings
