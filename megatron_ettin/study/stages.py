"""Stages of a study: trainings, exports, evaluations, the proof; each found done by its content."""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin import checkpoint, checkpoint_files
from megatron_ettin.config import RunConfig
from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.estimate.plan import num_checkpoints
from megatron_ettin.evaluation.measure import Unit, measure
from megatron_ettin.evaluation.model import Model, open_model
from megatron_ettin.evaluation.results import result_key
from megatron_ettin.evaluation.tasks.task import Task
from megatron_ettin.export.huggingface import to_huggingface
from megatron_ettin.file_digests import FileDigest
from megatron_ettin.model.counts import parameters
from megatron_ettin.order.shard_list import list_shards
from megatron_ettin.publication import publish_text
from megatron_ettin.study.arms import Study, StudyModel
from megatron_ettin.study.costs import Cost, Costs
from megatron_ettin.study.training import is_trained, train, training_config

#: Time of a conversion: a start, and reading, hashing and writing the weights.
EXPORT_SECONDS, EXPORT_BYTES_PER_S = 2.0, 100e6


@dataclass(frozen=True, kw_only=True)
class Stage(ABC):
    """A part of the study that runs, or is skipped, as a whole."""

    study: Study

    @property
    @abstractmethod
    def name(self) -> str:
        """Name on the command line, in the plan and in messages."""

    @property
    def kind(self) -> str:
        """Kind whose stages take alike many times their estimates: first part of the name."""
        return self.name.partition("/")[0]

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the stages without which this one cannot run."""
        return ()

    @property
    def runs_alone(self) -> bool:
        """True if the stage takes all devices, or reads what all stages before it make."""
        return False

    def check(self) -> None:
        """Check the inputs that no other stage makes.

        Raises:
            ValueError, OSError: naming file, line or field.
        """
        return

    def reads(self) -> Mapping[str, Task]:
        """Return the tasks that it measures, by name."""
        return {}

    def refusal(self) -> str | None:
        """Return why the stage does not suit its model, or None."""
        return None

    @abstractmethod
    def cost(self, costs: Costs) -> Cost:
        """Estimate what is left to do."""

    @abstractmethod
    def is_done(self) -> bool:
        """Tell whether the stage's content is there and of the present inputs."""

    @abstractmethod
    def run(self) -> None:
        """Make the content, going on from parts that are there; raise an error if that fails."""


@dataclass(frozen=True, kw_only=True)
class TrainingStage(Stage):
    """A run of `megatron_ettin.pretrain`."""

    model: StudyModel

    @property
    def name(self) -> str:
        """Name: train/ or, from another arm's weights, cross/, then SIZE/ARM/seed_N."""
        return _training_name(self.model)

    @property
    def kind(self) -> str:
        """Trainings of all arms take alike many times their estimates."""
        return "training"

    @property
    def runs_alone(self) -> bool:
        """True: its ranks have all devices."""
        return True

    @property
    def needs(self) -> tuple[str, ...]:
        """Training of the arm that it starts from."""
        return () if self.model.start is None else (_training_name(self.model.start),)

    def check(self) -> None:
        """Check configuration, tokenizer and corpora."""
        config = training_config(self.study, self.model)
        load_tokenizer(Path(config.data.tokenizer))
        prefixes = [source.prefix for source in config.data.sources.values()]
        corpora = (*prefixes, *config.data.validation)
        for prefix in (shard for corpus in corpora for shard in list_shards(corpus)):
            for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")):
                if not path.is_file():
                    raise ValueError(
                        f"{path}: no such file; tools/preprocess_data.py makes it (docs/data.md)"
                    )

    def cost(self, costs: Costs) -> Cost:
        """Estimate the rows that follow the newest checkpoint."""
        assert self.model.run is not None, "a published model is not trained"
        newest = self.model.run.newest_checkpoint()
        state = None if newest is None else checkpoint.read_state(newest)
        share = 0.0 if state is None else state.g / state.phase_ends[-1]
        return costs.training(training_config(self.study, self.model), share)

    def is_done(self) -> bool:
        """Tell whether the run has reached its end."""
        return is_trained(self.study, self.model)

    def run(self) -> None:
        """Train."""
        train(self.study, self.model)


@dataclass(frozen=True, kw_only=True)
class ExportStage(Stage):
    """Conversion of a run's last checkpoint to a Hugging Face folder."""

    model: StudyModel

    @property
    def name(self) -> str:
        """Name: export/MODEL."""
        return f"export/{self.model.name}"

    @property
    def needs(self) -> tuple[str, ...]:
        """Training of the model."""
        return (_training_name(self.model),)

    @property
    def _origin(self) -> Path:
        return Path(self.model.source + ".json")

    def cost(self, costs: Costs) -> Cost:
        """Estimate the conversion; the folder holds the weights in fp32."""
        return export_cost(training_config(self.study, self.model))

    def is_done(self) -> bool:
        """Tell whether the folder is of the run's last checkpoint."""
        if not Path(self.model.source).is_dir() or not self._origin.is_file():
            return False
        return bool(json.loads(self._origin.read_text()) == self._origin_of_weights())

    def run(self) -> None:
        """Convert."""
        folder = Path(self.model.source)
        self._origin.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        to_huggingface(self._checkpoint(), folder)
        open_model(str(folder))  # names what is missing, such as the tokenizer
        publish_text(self._origin, json.dumps(self._origin_of_weights(), indent=1) + "\n")

    def _checkpoint(self) -> Path:
        assert self.model.run is not None, "a published model is not exported"
        newest = self.model.run.newest_checkpoint()
        if newest is None:
            raise checkpoint_files.CheckpointError(f"{self.model.run.path}: no checkpoint here")
        return newest

    def _origin_of_weights(self) -> dict[str, str]:
        path = self._checkpoint()
        return {"checkpoint": path.name, "files": checkpoint_files.read_files(path).sha256}


@dataclass(frozen=True, kw_only=True)
class EvaluationStage(Stage):
    """Measurement of one model in one task with one seed."""

    model: StudyModel
    task_name: str
    task: Task
    seed: int

    @property
    def name(self) -> str:
        """Name: evaluate/MODEL/TASK/seed_N."""
        return f"evaluate/{self.model.name}/{self.task_name}/seed_{self.seed}"

    @property
    def kind(self) -> str:
        """Task, because the work of each is estimated in its own way."""
        return self.task_name

    @property
    def needs(self) -> tuple[str, ...]:
        """Export of the model, unless it is published."""
        return () if self.model.run is None else (f"export/{self.model.name}",)

    def reads(self) -> Mapping[str, Task]:
        """Return the task."""
        return {self.task_name: self.task}

    def check(self) -> None:
        """Check a published model; the task's data is checked once for all models."""
        if self.model.run is None:
            self.model.open()

    def refusal(self) -> str | None:
        """Return why the task does not suit the model; None too while the model is not there."""
        return self.task.refusal(self.model.open()) if self._is_there() else None

    def cost(self, costs: Costs) -> Cost:
        """Estimate the measurement; none if the task will refuse the model."""
        if self.task.refusal(costs.describe(self.model)):
            return Cost(seconds=0.0)
        return Cost(seconds=costs.task_seconds(self.model, self.task))

    def is_done(self) -> bool:
        """Tell whether the result of these weights, settings and data is there."""
        if not self._is_there():
            return False
        key = result_key(self.model.open(), self.task, self.seed)
        place = self.model.name, self.task_name, self.seed
        return self.study.results.read(*place, key) is not None

    def run(self) -> None:
        """Measure."""
        measure(
            Unit(model=self.model.open(), task_name=self.task_name, task=self.task, seed=self.seed),
            self.study.results,
        )

    def _is_there(self) -> bool:
        return self.model.run is None or Path(self.model.source).is_dir()


@dataclass(frozen=True, kw_only=True)
class SeriesStage(Stage):
    """Measurement of a run's checkpoints in some tasks."""

    model: StudyModel
    tasks: Mapping[str, Task]

    @property
    def name(self) -> str:
        """Name: series/MODEL."""
        return f"series/{self.model.name}"

    def reads(self) -> Mapping[str, Task]:
        """Return the tasks."""
        return self.tasks

    @property
    def needs(self) -> tuple[str, ...]:
        """Training of the model."""
        return (_training_name(self.model),)

    def cost(self, costs: Costs) -> Cost:
        """Estimate exports and measurements of all checkpoints that the run will have."""
        config = training_config(self.study, self.model)
        described = costs.describe(self.model)
        seconds = export_cost(config).seconds + sum(
            len(task.seeds) * costs.task_seconds(self.model, task)
            for task in self.tasks.values()
            if task.refusal(described) is None
        )
        tokens = [phase.train_tokens for phase in config.phases]
        return Cost(seconds=num_checkpoints(config, tokens) * seconds)

    def is_done(self) -> bool:
        """Tell whether the list of checkpoints is there, made of these and of these tasks."""
        path = self.study.series_file(self.model)
        if not path.is_file():
            return False
        listed = json.loads(path.read_text())
        keys = [(entry["step"], entry["key"]) for entry in listed]
        return keys == [(checkpoint.read_state(at).step, self._key(at)) for at in self._all()]

    def run(self) -> None:
        """Export each checkpoint into a folder that is removed again, and measure it."""
        listed = []
        for at in self._all():
            state = checkpoint.read_state(at)
            name = f"{self.model.name}-{at.name}"
            self._measure(at, name)
            listed.append(
                {
                    "step": state.step,
                    "tokens": state.consumed_tokens,
                    "model": name,
                    "key": self._key(at),
                }
            )
        publish_text(self.study.series_file(self.model), json.dumps(listed, indent=1) + "\n")

    def _measure(self, at: Path, name: str) -> None:
        store = self.study.series_results
        folder = store.folder / f"{name}.exported"
        shutil.rmtree(folder, ignore_errors=True)
        to_huggingface(at, folder)
        model: Model = open_model(str(folder), name)
        for task_name, task in self.tasks.items():
            if task.refusal(model) is None:
                for seed in task.seeds:
                    unit = Unit(model=model, task_name=task_name, task=task, seed=seed)
                    measure(unit, store)
        shutil.rmtree(folder)

    def _all(self) -> list[Path]:
        assert self.model.run is not None, "a published model has no checkpoints"
        return self.model.run.complete_checkpoints()

    def _key(self, at: Path) -> str:
        document = {
            "checkpoint": checkpoint_files.read_files(at).sha256,
            "tasks": {name: task.settings() for name, task in self.tasks.items()},
            "seeds": {name: list(task.seeds) for name, task in self.tasks.items()},
            "files": {
                str(path): FileDigest.of_file(path).sha256
                for task in self.tasks.values()
                for path in sorted(task.files())
            },
        }
        text = json.dumps(document, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def export_cost(config: RunConfig) -> Cost:
    """Estimate a conversion to a Hugging Face folder."""
    num_bytes = 4 * parameters(config.model).total
    return Cost(seconds=EXPORT_SECONDS + num_bytes / EXPORT_BYTES_PER_S, num_bytes=num_bytes)


def _training_name(model: StudyModel) -> str:
    kind = "train" if model.start is None else "cross"
    return f"{kind}/{model.size}/{model.arm}/seed_{model.seed}"
