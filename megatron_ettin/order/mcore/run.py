"""Description of a run that Megatron-LM trained: `config.yaml` with `order: mcore`.

Megatron keeps no single file from which a run's data can be found again: the prefixes, the batch
size and the number of iterations were options of its command line. A person writes them down here.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import jsonargparse
import yaml

from megatron_ettin.config.combine import check_names
from megatron_ettin.order.mcore.schedule import BatchSchedule, parse_step_sizes, ramp_up
from megatron_ettin.order.run_folder import RunFolder

#: Value of the field `order` that marks such a file.
FORMAT = "mcore"
#: Megatron's splits, in the order of its split matrix.
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class McoreConfig:
    """Fields of the file, named after Megatron's options; paths are relative to its folder."""

    order: Literal["mcore"]
    cache: str
    """Folder of the index caches: `--data-cache-path`."""
    prefixes: dict[str, str]
    """A name for each corpus and its path without suffix, in the order of `--data-path`."""
    seq_length: int
    """Tokens per row: `--seq-length`."""
    global_batch_size: int | None = None
    """Rows per iteration."""
    rampup_batch_size: list[int] | None = None
    """First size, increment, samples: `--rampup-batch-size`."""
    step_batch_size_schedule: str | None = None
    """Such as "0:768 250B:1536", instead of `global_batch_size`."""
    train_steps: int | None = None
    """Iterations: `--train-iters`."""
    train_samples: int | None = None
    """Rows, instead of `train_steps`; only whole iterations count."""
    checkpoints: list[int] | None = None
    """Iterations with a checkpoint."""
    checkpoint_dir: str | None = None
    """Folder of Megatron's iter_0000000 folders, instead of `checkpoints`."""
    add_extra_token: bool = True
    """Read rows with one more token, the last label, as Megatron does by default."""
    split: Literal["train", "valid", "test"] = "train"
    """Split of the corpora that the rows are drawn from."""
    seed: int | None = None
    """`--seed`; needed only where the cache holds runs with several."""
    cache_key: str | None = None
    """Hash in the names of the cache's files; needed only where several fit."""
    cached_as: dict[str, str] = field(default_factory=dict)
    """Path that Megatron was given, for a corpus that has moved since."""

    def __post_init__(self) -> None:
        """Check each number and name, then what must hold between fields.

        Raises:
            ValueError: naming the field.
        """
        for name in ("seq_length", "global_batch_size", "train_steps", "train_samples"):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                raise ValueError(f"{name}: expected an integer >= 1, found {value!r}")
        for name in ("rampup_batch_size", "checkpoints"):
            if not all(_is_count(value) for value in getattr(self, name) or ()):
                raise ValueError(
                    f"{name}: expected a list of integers >= 1, found {getattr(self, name)!r}"
                )
        if self.seed is not None and not (self.seed == 0 or _is_count(self.seed)):
            raise ValueError(f"seed: expected an integer >= 0, found {self.seed!r}")
        for name in ("prefixes", "cached_as"):
            for key, path in getattr(self, name).items():
                if not isinstance(key, str) or not key or not path:
                    raise ValueError(
                        f"{name}: expected `NAME: PATH` entries, found {key!r}: {path!r}"
                    )
        if unknown := set(self.cached_as) - set(self.prefixes):
            raise ValueError(f"cached_as: {min(unknown)!r} is not one of the prefixes")
        self._check_alternatives()

    def _check_alternatives(self) -> None:
        """Raise ValueError where two fields say the same thing, or neither does."""
        if self.step_batch_size_schedule is not None:
            for name in ("global_batch_size", "rampup_batch_size"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: give either this or step_batch_size_schedule")
        elif self.global_batch_size is None:
            raise ValueError("global_batch_size: missing")
        if (self.train_steps is None) == (self.train_samples is None):
            raise ValueError("train_steps: expected either this or train_samples")
        if self.checkpoints is not None and self.checkpoint_dir is not None:
            raise ValueError("checkpoints: give either this or checkpoint_dir")


@dataclass(frozen=True, kw_only=True)
class McoreRun:
    """The data of a run of Megatron: files, steps and checkpoints; paths can be opened as given."""

    folder: Path
    """Folder of the file; messages name it."""
    cache: Path
    """Folder of the index caches: Megatron's `--data-cache-path`."""
    prefixes: Mapping[str, str]
    """A name for each corpus and its path without suffix, in the order of `--data-path`."""
    seq_length: int
    """Tokens per row: `--seq-length`."""
    schedule: BatchSchedule
    """Rows of each iteration."""
    train_steps: int
    """Iterations of the whole run."""
    checkpoints: tuple[int, ...] = ()
    """Iterations with a checkpoint, ascending."""
    add_extra_token: bool = True
    """Rows have one more token, the last label, as Megatron's do by default."""
    split: str = "train"
    """Split of the corpora: one of SPLITS."""
    seed: int | None = None
    """`--seed`; needed only where the cache holds runs with several."""
    cache_key: str | None = None
    """Hash in the names of the cache's files; needed only where several fit."""
    cached_as: Mapping[str, str] = field(default_factory=dict)
    """The path Megatron knew a corpus by, for one that has moved since."""

    @property
    def num_rows(self) -> int:
        """Rows of all iterations."""
        return self.schedule.rows_of_step(self.train_steps)[1]

    def to_dict(self) -> dict[str, str]:
        """Return the format's name and all fields as text, but folder and schedule.

        Runs in two folders may be equal, and the steps show the schedule.
        """
        values = dataclasses.asdict(self)
        del values["folder"], values["schedule"]
        return {"format": FORMAT, **{name: str(value) for name, value in values.items()}}

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `config.yaml` of a folder.

        Raises:
            FileNotFoundError: no such file.
            ValueError: naming the file and the field that is missing, unknown or not allowed.
        """
        path = RunFolder(folder).config
        try:
            document = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML: {error}") from error
        if not isinstance(document, dict):
            raise ValueError(f"{path}: expected fields such as `order: mcore`, found {document!r}")
        if document.get("order") != FORMAT:
            raise ValueError(f"{path}: order: expected `{FORMAT}`")
        check_names(str(path), McoreConfig)
        try:
            return cls._resolve(_parse(document), folder)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _resolve(cls, config: McoreConfig, folder: Path) -> Self:
        """Return the run that a file in `folder` describes."""
        schedule = _schedule(config)
        return cls(
            folder=folder,
            cache=folder / config.cache,
            prefixes={name: str(folder / path) for name, path in config.prefixes.items()},
            seq_length=config.seq_length,
            schedule=schedule,
            train_steps=_train_steps(config, schedule),
            checkpoints=_checkpoints(config, folder),
            add_extra_token=config.add_extra_token,
            split=config.split,
            seed=config.seed,
            cache_key=config.cache_key,
            cached_as=config.cached_as,
        )


def _parse(document: dict[str, Any]) -> McoreConfig:
    """Return the fields of a file.

    Raises:
        ValueError: naming the field that is missing, empty, or of another type.
    """
    for name, value in document.items():
        if value in (None, "", {}):
            raise ValueError(f"{name}: missing")
    try:
        # A copy, because the parser converts the entries of lists in place.
        fields = _parser().parse_object(copy.deepcopy(document)).as_dict()
    except jsonargparse.ArgumentError as error:
        message = re.sub(r'^Parser key "(.+?)":', r"\1:", str(error))
        raise ValueError(" ".join(message.split())) from error
    # jsonargparse reads "32" as 32 and "true" as true; Megatron's options are taken as written.
    for name, value in document.items():
        if fields[name] != value or type(fields[name]) is not type(value):
            raise ValueError(f"{name}: expected {fields[name]!r}, found {value!r}")
    return McoreConfig(**fields)


@functools.cache
def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(McoreConfig)
    return parser


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1  # True is an int, but no count


def _schedule(config: McoreConfig) -> BatchSchedule:
    if config.step_batch_size_schedule is not None:
        return parse_step_sizes(config.step_batch_size_schedule, config.seq_length)
    assert config.global_batch_size is not None
    if config.rampup_batch_size is not None:
        return ramp_up(config.global_batch_size, config.rampup_batch_size)
    return BatchSchedule([(0, config.global_batch_size)])


def _train_steps(config: McoreConfig, schedule: BatchSchedule) -> int:
    if config.train_steps is not None:
        return config.train_steps
    assert config.train_samples is not None
    # Row number train_samples is the first left out, so its iteration is not taken.
    steps = schedule.step_of_row(config.train_samples) - 1
    if steps < 1:
        raise ValueError(f"train_samples: {config.train_samples} is less than one batch")
    return steps


def _checkpoints(config: McoreConfig, folder: Path) -> tuple[int, ...]:
    """Return the iterations with a checkpoint, ascending, as listed or as found on disk."""
    if config.checkpoint_dir is None:
        return tuple(sorted(set(config.checkpoints or ())))
    checkpoints = folder / config.checkpoint_dir
    if not checkpoints.is_dir():
        raise ValueError(f"checkpoint_dir: {checkpoints} is not a folder")
    names = (re.fullmatch(r"iter_(\d{7,})", entry.name) for entry in checkpoints.iterdir())
    iterations = tuple(sorted(int(match[1]) for match in names if match))
    if not iterations:
        raise ValueError(f"checkpoint_dir: {checkpoints} has no iter_0000000 folders")
    return iterations
