"""The models of a study, and the places of all its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.evaluation.model import Model, open_model
from megatron_ettin.evaluation.results import ResultStore, file_name
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.study.config import StudyConfig


@dataclass(frozen=True, kw_only=True)
class StudyModel:
    """A model of the study: one size, arm and seed."""

    name: str
    """SIZE-ARM-seed_N, or SIZE-ARM if it is published: its name in results."""
    size: str
    arm: str
    seed: int | None
    """Training seed; None if it is published."""
    source: str
    """Hugging Face folder, or name on the Hub."""
    run: RunFolder | None
    """Folder of its training; None if it is published."""
    start: StudyModel | None = None
    """Model whose weights it starts from; None for new weights and published models."""

    @property
    def is_series(self) -> bool:
        """True if it is trained from new weights: its checkpoints are evaluated too."""
        return self.run is not None and self.start is None

    def open(self) -> Model:
        """Open it for evaluation; ValueError if it is not there."""
        return open_model(self.source, self.name)


@dataclass(frozen=True)
class Study:
    """A study's models and files; nothing is read or written before a method asks for it."""

    config: StudyConfig

    @property
    def output(self) -> Path:
        """Folder of all that the study writes."""
        return Path(self.config.output)

    @property
    def results(self) -> ResultStore:
        """Results of the models, by `StudyModel.name`."""
        return ResultStore(self.output / "results")

    @property
    def series_results(self) -> ResultStore:
        """Results of the checkpoints, by the names that `series_file` lists."""
        return ResultStore(self.output / "series")

    @property
    def proof(self) -> Path:
        """File with the proof that the arms saw the same rows (`study.proof`)."""
        return self.output / "proof.json"

    @property
    def page(self) -> Path:
        """Folder of the page."""
        return self.output / "page"

    def series_file(self, model: StudyModel) -> Path:
        """Return the list of a model's evaluated checkpoints: a JSON array by tokens.

        Each is an object with `step`, `tokens` (consumed until then) and `model` (its name in
        `series_results`).
        """
        return self.output / "series" / f"{file_name(model.name)}.json"

    def stage_file(self, stage: str) -> Path:
        """Return the record of a stage; its output is beside it, with the suffix .log."""
        return self.output / "stages" / f"{stage}.json"

    def models(self) -> list[StudyModel]:
        """Return all models by size, arm and seed, in the order of the configuration."""
        trained = list(self.config.sizes)
        named = [size for arm in self.config.arms.values() for size in arm.published]
        sizes = [*trained, *dict.fromkeys(size for size in named if size not in trained)]
        return [
            model
            for size in sizes
            for arm in self.config.arms
            for model in self._models_of(size, arm)
        ]

    def _models_of(self, size: str, arm: str) -> list[StudyModel]:
        settings = self.config.arms[arm]
        if settings.objective is not None:
            seeds = self.config.seeds if size in self.config.sizes else []
            return [self._trained(size, arm, seed) for seed in seeds]
        if size not in settings.published:
            return []
        source = settings.published[size]
        name = f"{size}-{arm}"
        return [StudyModel(name=name, size=size, arm=arm, seed=None, source=source, run=None)]

    def _trained(self, size: str, arm: str, seed: int) -> StudyModel:
        start = self.config.arms[arm].starts_from
        name = f"{size}-{arm}-seed_{seed}"
        return StudyModel(
            name=name,
            size=size,
            arm=arm,
            seed=seed,
            source=str(self.output / "models" / name),
            run=RunFolder(self.output / "runs" / size / arm / f"seed_{seed}"),
            start=None if start is None else self._trained(size, start, seed),
        )
