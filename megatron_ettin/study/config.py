"""Configuration of a study: sizes, arms, seeds, evaluations; read from one YAML file."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

import jsonargparse

from megatron_ettin.config import ConfigError
from megatron_ettin.config.combine import check_names
from megatron_ettin.devices import DEVICES


@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """Files of one model size, as `megatron_ettin.pretrain --config` takes them."""

    run: list[str]
    """Files of a run from new weights: model, phases, data, hardware; all but the objective."""
    cross: list[str] = field(default_factory=list)
    """Files of a run that starts from another arm's weights."""


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One of the siblings, at every size: trained here, or published."""

    objective: str | None = None
    """File of the objective."""
    starts_from: str | None = None
    """Arm whose last weights this one starts from; new weights if not given."""
    published: dict[str, str] = field(default_factory=dict)
    """In place of training: Hugging Face folders or names on the Hub, by size."""

    def __post_init__(self) -> None:
        """Refuse an arm that is both trained and published, or neither."""
        if (self.objective is None) == (not self.published):
            raise ValueError("arms: each has either an objective or published models")
        if self.published and self.starts_from is not None:
            raise ValueError("arms: a published one starts from no other")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """One study. Paths are relative to the working directory, as those of a run are."""

    output: str
    """Folder of all that the study writes."""
    arms: dict[str, ArmConfig]
    """The siblings by name, in the order of tables and figures."""
    evaluation: str
    """File with the tasks (examples/evaluation)."""
    sizes: dict[str, SizeConfig] = field(default_factory=dict)
    """Model sizes by name, in the order of figures. Published arms alone need none."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Repetitions of all trainings. Seed n adds n to each of the configuration's `seeds`, so the
    arms of one seed share rows, masks and first weights."""
    train_tokens: int | None = None
    """Tokens of the phases of `run` together; all phases, those of `cross` too, are scaled by the
    same factor. As the files say, if not given."""
    checkpoints: int = 8
    """Checkpoints of a run at equal distances. An interrupted run loses what follows the last."""
    series: list[str] = field(default_factory=list)
    """Tasks that are measured at each checkpoint of the arms with new weights."""
    launch: list[str] = field(default_factory=lambda: ["torchrun", "--standalone"])
    """Command before `-m megatron_ettin.pretrain` and its options."""
    device: str = "cpu"
    """Device of each rank, for the plan: cpu (this machine) or a GPU of tools/estimate.py."""
    num_devices: int = 1
    """Ranks that `launch` starts, one a device. As many evaluations run side by side on this
    machine, as far as it has the devices: GPUs, or without any, cores."""

    def __post_init__(self) -> None:
        """Refuse names that are not there, and values that cannot be."""
        for name in (*self.arms, *self.sizes):
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(f"arms, sizes: {name!r} is no name of letters, digits and .+-_")
        for name, arm in self.arms.items():
            if arm.starts_from is not None:
                self._check_start(name, arm.starts_from)
            if arm.objective is not None and not self.sizes:
                raise ValueError(f"arms.{name}: is trained, but sizes names no model size")
        self._check_values()

    def _check_values(self) -> None:
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"seeds: {self.seeds}; give different ones, of 0 or more")
        for name in ("checkpoints", "num_devices", "train_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is not positive")
        if not self.launch:
            raise ValueError("launch: is empty; [torchrun, --standalone] starts one process")
        if self.device not in DEVICES:
            raise ValueError(f"device: {self.device!r}; there are {', '.join(DEVICES)}")

    def _check_start(self, name: str, start: str) -> None:
        if start not in self.arms or self.arms[start].objective is None:
            raise ValueError(f"arms.{name}.starts_from: {start!r} is no arm that is trained")
        if list(self.arms).index(start) >= list(self.arms).index(name):
            raise ValueError(f"arms.{name}.starts_from: {start!r} must come before {name!r}")
        if lacking := [size for size, files in self.sizes.items() if not files.cross]:
            raise ValueError(f"sizes.{lacking[0]}.cross: no files, but arms.{name} needs them")


def load_study(path: Path, **changes: object) -> StudyConfig:
    """Read a study; `changes` replace fields of it.

    Raises:
        ConfigError: naming the file, and the field that is unknown, missing or wrong.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(StudyConfig)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; examples/study has examples")
    try:
        check_names(str(path), StudyConfig)
        config = StudyConfig(**vars(parser.instantiate(parser.parse_path(str(path)))))
        return dataclasses.replace(config, **changes)  # type: ignore[arg-type]
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        message = str(error)
        raise ConfigError(message if str(path) in message else f"{path}: {message}") from error
