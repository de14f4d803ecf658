"""A study over tokens: the losses of its runs, their cost, and scores of their checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ettin.config import RunConfig
from megatron_ettin.evaluation.results import read_result
from megatron_ettin.evaluation.scores import Score, over_seeds
from megatron_ettin.evaluation.tasks.task import Family, Task
from megatron_ettin.model.counts import flops_per_token
from megatron_ettin.objectives import Objective, all_measure_text
from megatron_ettin.study.arms import Study, StudyModel
from megatron_ettin.training.validation import HeldOutLoss

#: Standard errors on either side of an interval of 95 %.
STANDARD_ERRORS = 1.96
#: Kind of the losses that are -log p(text) in nats per token, or bounds of it from above.
TEXT_LOSS = "-log p(text)"


@dataclass(frozen=True, kw_only=True)
class History:
    """A run's reports in order of tokens."""

    model: StudyModel
    objective: Objective
    """Objective of the phase last trained."""
    start_tokens: int
    """Tokens of the run whose weights it started from; 0 with new weights."""
    training: Sequence[Mapping[str, Any]]
    """Lines of metrics.jsonl about training intervals."""
    validation: Sequence[Mapping[str, Any]]
    """Lines of metrics.jsonl about held-out losses."""
    flops: float
    """Operations of the model for its tokens, as if each row held one document: an upper bound."""

    @property
    def tokens(self) -> int:
        """Tokens that the run has trained on."""
        return int(self.training[-1]["tokens"])

    @property
    def hours(self) -> float:
        """Hours of its training loop."""
        return float(sum(record["seconds"] for record in self.training)) / 3600.0

    @property
    def held_out(self) -> HeldOutLoss | None:
        """Return the last held-out loss; None if none was measured."""
        if not self.validation:
            return None
        last = self.validation[-1]
        return HeldOutLoss(
            loss=last["heldout_loss"],
            standard_error=last["heldout_standard_error"],
            scored_tokens=last["scored_tokens"],
        )

    @property
    def loss_kind(self) -> str:
        """Name of what its held-out loss measures: losses of one kind can be compared."""
        return TEXT_LOSS if all_measure_text(self.objective) else type(self.objective).__name__


@dataclass(frozen=True, kw_only=True)
class CheckpointScore:
    """A task's first score at one checkpoint of a run."""

    size: str
    arm: str
    training_seed: int | None
    family: Family
    task: str
    tokens: int
    score: Score


def read_histories(models: Sequence[StudyModel]) -> list[History]:
    """Read the metrics of all models whose training has reported; the others are left out.

    Raises:
        ValueError: a line of metrics.jsonl is no JSON, or a run has no configuration that is valid.
    """
    histories: dict[str, History] = {}
    for model in models:
        if model.run is None or not model.run.metrics_lines():
            continue
        records = [json.loads(line) for line in model.run.metrics_lines()]
        training = [record for record in records if record["kind"] == "train"]
        if not training:
            continue
        start = histories.get(model.start.name) if model.start is not None else None
        config = model.run.read_config()
        histories[model.name] = History(
            model=model,
            objective=config.objective.for_phase(str(training[-1]["phase"])),
            start_tokens=0 if start is None else start.start_tokens + start.tokens,
            training=training,
            validation=[record for record in records if record["kind"] == "validation"],
            flops=_flops(config, training),
        )
    return list(histories.values())


def read_checkpoints(study: Study, tasks: Mapping[str, Task]) -> list[CheckpointScore]:
    """Read the scores of all checkpoints that the study's series list.

    Raises:
        ValueError: a file is no result.
    """
    checkpoints = []
    for model in study.models():
        listed = study.series_file(model)
        for entry in json.loads(listed.read_text()) if listed.is_file() else []:
            for name in study.config.series:
                paths = [
                    study.series_results.path(entry["model"], name, seed)
                    for seed in tasks[name].seeds
                ]
                results = [read_result(path) for path in paths if path.is_file()]
                if not results:
                    continue
                checkpoints.append(
                    CheckpointScore(
                        size=model.size,
                        arm=model.arm,
                        training_seed=model.seed,
                        family=tasks[name].family,
                        task=name,
                        tokens=entry["tokens"],
                        score=over_seeds([next(iter(r.scores.values())) for r in results]),
                    )
                )
    return checkpoints


def _flops(config: RunConfig, training: Sequence[Mapping[str, Any]]) -> float:
    """Count the operations for the tokens of each phase that was begun."""
    total, before = 0.0, 0
    for phase in config.phases:
        ends = [record["tokens"] for record in training if record["phase"] == phase.name]
        if not ends:
            continue
        for objective, share in config.objective.for_phase(phase.name).row_shares():
            scored = objective.scored_share(phase.name)
            flops = flops_per_token(config.model, objective.attention, phase.seq_length, scored)
            total += (ends[-1] - before) * share * flops.model
        before = ends[-1]
    return total
