"""A study's folder with made-up numbers, written by the classes that a study writes it with."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_ettin.config import parse_args, to_yaml
from megatron_ettin.evaluation.model import Model
from megatron_ettin.evaluation.results import Result
from megatron_ettin.evaluation.scores import Score
from megatron_ettin.evaluation.tasks.task import Family, Task, TaskScores, TaskWork
from megatron_ettin.queries.twins import TwinRun, TwinsProof
from megatron_ettin.study.arms import Study, StudyModel
from megatron_ettin.study.config import ArmConfig, SizeConfig, StudyConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
OBJECTIVES = {
    "encoder": "mlm",
    "decoder": "clm",
    "encoder-from-decoder": "mntp",
    "decoder-from-encoder": "clm",
    "detour": "detour",
    "diffusion": "diffusion",
}
STARTS = {"encoder-from-decoder": "decoder", "decoder-from-encoder": "encoder"}


@dataclass(frozen=True, kw_only=True)
class MadeTask(Task):
    """A task whose answers are drawn: right with a probability of each arm's own."""

    kind: Family
    probabilities: Mapping[str, float] = field(default_factory=dict)
    num_items: int = 400
    chance: float | None = 0.5
    names: Sequence[str] = ("accuracy",)
    metric: str = "accuracy"

    @property
    def family(self) -> Family:  # type: ignore[override]  # the real ones have it by class
        return self.kind

    def files(self) -> list[Path]:
        return []

    def check(self) -> None:
        return

    def work(self, model: Model) -> TaskWork:
        return TaskWork()

    def measure(self, model: Model, *, seed: int, scratch: Path) -> TaskScores:
        raise AssertionError("the results of this task are made up, never measured")

    def made_scores(self, model: StudyModel, seed: int, share: float = 1.0) -> dict[str, Score]:
        """Draw the answers; items are of one difficulty for all arms. `share` moves to chance."""
        floor = self.chance or 0.0
        probability = floor + share * (self.probabilities[model.arm] - floor)
        scores = {}
        for number, name in enumerate(self.names):
            difficulty = np.random.default_rng(number).random(self.num_items)
            own = np.random.default_rng([number, seed, *model.name.encode()])
            right = difficulty + own.normal(0.0, 0.1, self.num_items) < probability
            scores[name] = Score(
                metric=self.metric,
                items=tuple(f"item {item}" for item in range(self.num_items)),
                predictions=right[None].astype(float),
                chance=self.chance,
            )
        return scores


def made_study(
    folder: Path, sizes: Sequence[str], names: Sequence[str] = tuple(OBJECTIVES), **fields: object
) -> Study:
    """Return a study of these arms; nothing is written."""
    arms = {
        arm: ArmConfig(
            objective=f"examples/objective/{OBJECTIVES[arm]}.yaml", starts_from=STARTS.get(arm)
        )
        for arm in names
    }
    config = StudyConfig(
        output=str(folder),
        arms=arms,
        evaluation="examples/evaluation/nano.yaml",
        sizes={size: SizeConfig(run=["run.yaml"], cross=["cross.yaml"]) for size in sizes},
        **fields,  # type: ignore[arg-type]
    )
    return Study(config)


def write_results(study: Study, tasks: Mapping[str, MadeTask], **notes: object) -> None:
    """Write the results of all models, tasks and seeds."""
    for model in study.models():
        for name, task in tasks.items():
            for seed in task.seeds:
                scores = task.made_scores(model, seed)
                study.results.write(made_result(model.name, name, task, seed, scores, **notes))


def made_result(
    model: str, name: str, task: MadeTask, seed: int, scores: Mapping[str, Score], **notes: object
) -> Result:
    return Result(
        model=model,
        task=name,
        seed=seed,
        key="made",
        settings=task.settings(),
        scores=scores,
        notes=notes,
        seconds=12.0,
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
    )


def write_series(study: Study, tasks: Mapping[str, MadeTask], tokens: Sequence[int]) -> None:
    """Write the checkpoints of the arms with new weights, and their results."""
    for model in study.models():
        if not model.is_series:
            continue
        listed = []
        for step, reached in enumerate(tokens, start=1):
            checkpoint = f"{model.name}-step_{step:08d}"
            listed.append({"step": step, "tokens": reached, "model": checkpoint})
            for name in study.config.series:
                scores = tasks[name].made_scores(model, 0, share=step / len(tokens))
                result = made_result(checkpoint, name, tasks[name], 0, scores)
                study.series_results.write(result)
        study.series_file(model).parent.mkdir(parents=True, exist_ok=True)
        study.series_file(model).write_text(json.dumps(listed))


def write_runs(study: Study, tokens: int, cross_tokens: int) -> None:
    """Write the configuration and metrics.jsonl of every run: a loss that falls over tokens."""
    for index, model in enumerate(study.models()):
        assert model.run is not None
        model.run.path.mkdir(parents=True)
        flags = [EXAMPLES / "model/nano", EXAMPLES / "objective" / OBJECTIVES[model.arm]]
        flags += [EXAMPLES / "phase/nano/pretrain", EXAMPLES / "data/quickstart"]
        config = parse_args([*(f"--config={path}.yaml" for path in flags), "--run_dir=run"])
        model.run.config.write_text(to_yaml(config))
        end = tokens if model.start is None else cross_tokens
        rng = np.random.default_rng(index)
        lines = []
        for step in range(1, 61):
            reached = end * step // 60
            loss = 4.0 + 0.3 * (index % 4) + 4.0 * math.exp(-4.0 * step / 60) + rng.normal() / 12
            lines.append(
                {"kind": "train", "step": step, "phase": "pretrain", "tokens": reached,
                 "loss": loss, "seconds": 6.0}
            )  # fmt: skip
            if step % 10 == 0:
                lines.append(
                    {"kind": "validation", "step": step, "phase": "pretrain", "tokens": reached,
                     "heldout_loss": loss + 0.1, "heldout_standard_error": 0.03,
                     "scored_tokens": 5000}
                )  # fmt: skip
        model.run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_proof(study: Study, verdict: str = "PASS") -> None:
    """Write a proof for the arms with new weights of each size and seed."""
    groups = []
    for size in study.config.sizes:
        for seed in study.config.seeds:
            models = [m for m in study.models() if (m.size, m.seed) == (size, seed) and not m.start]
            runs = [
                TwinRun(
                    run=str(model.run.path if model.run else ""), objective=OBJECTIVES[model.arm],
                    order_id="0a" * 16, steps=60, end_g=12_000, tokens=3_000_000, forks=0, seq=70,
                    chain="1b" * 16, compared_tokens=3_000_000, order_digest="2c" * 16,
                    token_digest="3d" * 16,
                )
                for model in models
            ]  # fmt: skip
            reasons = [] if verdict == "PASS" else ["rows [0, 8) are other tokens"]
            proofs = [
                TwinsProof(
                    verdict=verdict, phase_id="4e" * 16, shared_boundaries=60, last_shared_g=12_000,
                    reasons=reasons, disagreement=[], runs=[runs[0], other], notes=[],
                )
                for other in runs[1:]
            ]  # fmt: skip
            groups.append(
                {"size": size, "seed": seed, "stage": "train", "models": [m.name for m in models],
                 "verdict": verdict, "proofs": [dataclasses.asdict(proof) for proof in proofs]}
            )  # fmt: skip
    study.proof.parent.mkdir(parents=True, exist_ok=True)
    study.proof.write_text(json.dumps({"records": {}, "groups": groups}))
