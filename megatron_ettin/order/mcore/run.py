"""What a person says of a run that Megatron-LM trained: `config.yaml` with `order: mcore`.

Megatron keeps no single file from which a run's data can be found again: the prefixes, the batch
size and the number of iterations were options of its command line. They are written down here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Self

import yaml

from megatron_ettin.order.run_folder import RunFolder

#: Value of the field `order` that marks such a file.
FORMAT = "mcore"
FIELDS = (
    "order",
    "cache",
    "prefixes",
    "seq_length",
    "global_batch_size",
    "rampup_batch_size",
    "step_batch_size_schedule",
    "train_steps",
    "train_samples",
    "checkpoints",
    "checkpoint_dir",
    "add_extra_token",
    "split",
    "seed",
    "cache_key",
    "cached_as",
)
SPLITS = ("train", "valid", "test")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class _ScheduleError(ValueError):
    """A batch size schedule that Megatron would refuse."""


def ramp_up(global_batch_size: int, ramp: Sequence[int]) -> BatchSchedule:
    """Return the schedule of `--rampup-batch-size` (first batch size, increment, samples).

    Source: RampupBatchsizeNumMicroBatchesCalculator of megatron-core 0.16.1, without
    `--decrease-batch-size-if-needed`. Raises ValueError where Megatron would refuse.
    """
    if len(ramp) != 3:
        raise _ScheduleError(f"expected [first batch size, increment, samples], found {ramp}")
    first, increment, samples = ramp
    increments, rest = divmod(global_batch_size - first, increment)
    if rest or increments < 1:
        raise _ScheduleError(
            f"from {first} by {increment} does not lead up to the global batch size "
            f"{global_batch_size}"
        )
    # A float and its rounding decide the cuts, because they do in Megatron.
    per_increment = samples / increments
    sizes = [(0, first)]
    for level in range(1, increments + 1):
        rows = math.ceil(per_increment * level)
        while int(rows / per_increment) >= level:
            rows -= 1
        while int(rows / per_increment) < level:
            rows += 1
        # Above `samples` the ramp is over, whatever the division says.
        sizes.append((rows, first + level * increment))
    sizes[-1] = (min(sizes[-1][0], samples + 1), global_batch_size)
    return BatchSchedule(sizes)


def step_sizes(text: str, seq_length: int) -> BatchSchedule:
    """Return the schedule of `--step-batch-size-schedule`, such as "0:768 250B:1536" in tokens.

    Source: StepBatchsizeNumMicroBatchesCalculator of megatron-core 0.19.2. Raises ValueError for
    a text that does not begin at 0 or does not ascend.
    """
    sizes = []
    for entry in text.replace(",", " ").split():
        parts = re.fullmatch(r"([\d.]+)([KMBT]?):([\d.]+)([KMBT]?)", entry.upper())
        if parts is None:
            raise _ScheduleError(f"{entry!r} is not TOKENS:BATCH_SIZE")
        tokens, size = (int(float(parts[i]) * _UNITS[parts[i + 1]]) for i in (1, 3))
        sizes.append((tokens // seq_length, size))
    sizes.sort()
    ascend = all(a < b for (a, _), (b, _) in itertools.pairwise(sizes))
    if not sizes or sizes[0][0] or not ascend or min(size for _, size in sizes) < 1:
        raise _ScheduleError(f"{text!r} must begin at 0 and ascend, with sizes >= 1")
    return BatchSchedule(sizes)


class BatchSchedule:
    """Rows of each iteration, counted from 1, under a batch size that grows."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Take (rows consumed, batch size from then on) with rows ascending from 0."""
        # Where a batch size is first used: the steps and the rows before, and the size.
        self._steps, self._rows, self._sizes = [0], [0], [sizes[0][1]]
        for threshold, size in sizes[1:]:
            steps = max(0, -(-(threshold - self._rows[-1]) // self._sizes[-1]))
            self._steps.append(self._steps[-1] + steps)
            self._rows.append(self._rows[-1] + steps * self._sizes[-1])
            self._sizes.append(size)

    def rows_of_step(self, step: int) -> tuple[int, int]:
        """Return the rows [begin, end) of iteration `step` >= 1."""
        if step < 1:
            raise ValueError(f"step {step}: iterations count from 1")
        level = bisect_right(self._steps, step - 1) - 1
        begin = self._rows[level] + (step - 1 - self._steps[level]) * self._sizes[level]
        return begin, begin + self._sizes[level]

    def step_of_row(self, g: int) -> int:
        """Return the iteration, from 1, that holds row `g` >= 0."""
        if g < 0:
            raise ValueError(f"row {g}: rows count from 0")
        level = bisect_right(self._rows, g) - 1
        return self._steps[level] + (g - self._rows[level]) // self._sizes[level] + 1


@dataclass(frozen=True, kw_only=True)
class McoreRun:
    """A Megatron run, as far as its data go. Paths are relative to the file's folder."""

    folder: Path
    """Folder of the file; messages name it."""
    cache: Path
    """Folder of the index caches: Megatron's `--data-cache-path`."""
    prefixes: Mapping[str, str]
    """A name for each corpus and its path without suffix, in the order of `--data-path`."""
    seq_length: int
    """Tokens per row: `--seq-length`."""
    schedule: BatchSchedule
    """Rows per iteration: from `global_batch_size` and perhaps `rampup_batch_size: [first size,
    increment, samples]`, or from `step_batch_size_schedule`, written as Megatron's options are."""
    train_steps: int
    """Iterations: `--train-iters`. Where the file says `train_samples`, those that fit in it."""
    checkpoints: tuple[int, ...] = ()
    """Iterations with a checkpoint, ascending; from `checkpoint_dir` where the file names that."""
    add_extra_token: bool = True
    """Whether rows are read with one token more, as Megatron does unless told otherwise."""
    split: str = "train"
    """Which of Megatron's splits: train, valid or test."""
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
        """Return the format's name and all fields as text, but for what the steps show."""
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
            values = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected fields such as `order: mcore`, found {values!r}")
        return cls(**_Fields(path, values).parse())


class _Fields:
    """The fields of one file, taken one by one; what is left over at the end is refused."""

    def __init__(self, path: Path, values: dict[Any, Any]) -> None:
        self.path = path
        self.values = dict(values)

    def refuse(self, name: str, why: str) -> NoReturn:
        raise ValueError(f"{self.path}: {name}: {why}")

    def parse(self) -> dict[str, Any]:
        if self.values.pop("order", None) != FORMAT:
            self.refuse("order", "expected `mcore`")
        found: dict[str, Any] = {
            "folder": self.path.parent,
            "cache": self.path.parent / self.text("cache"),
            "prefixes": self.paths("prefixes"),
            "seq_length": (seq_length := self.integer("seq_length")),
            "schedule": (schedule := self.schedule(seq_length)),
            "train_steps": self.steps(schedule),
            "checkpoints": self.checkpoints(),
            "add_extra_token": self.flag("add_extra_token", default=True),
            "split": self.text("split", default="train"),
            "seed": self.integer("seed", minimum=0) if "seed" in self.values else None,
            "cache_key": self.text("cache_key") if "cache_key" in self.values else None,
            "cached_as": self.texts("cached_as") if "cached_as" in self.values else {},
        }
        if found["split"] not in SPLITS:
            self.refuse("split", f"{found['split']!r} is none of {', '.join(SPLITS)}")
        if unknown := set(found["cached_as"]) - set(found["prefixes"]):
            self.refuse("cached_as", f"{min(unknown)!r} is not one of the prefixes")
        if self.values:
            self.refuse(str(next(iter(self.values))), f"unknown; there are {', '.join(FIELDS)}")
        return found

    def take(self, name: str) -> Any:
        if self.values.get(name) is None:
            self.refuse(name, "missing")
        return self.values.pop(name)

    def text(self, name: str, default: str | None = None) -> str:
        if default is not None and name not in self.values:
            return default
        value = self.take(name)
        if not isinstance(value, str) or not value:
            self.refuse(name, f"expected a text, found {value!r}")
        return value

    def integer(self, name: str, minimum: int = 1) -> int:
        value = self.take(name)
        if type(value) is not int or value < minimum:
            self.refuse(name, f"expected an integer >= {minimum}, found {value!r}")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.values.pop(name, default)
        if not isinstance(value, bool):
            self.refuse(name, f"expected true or false, found {value!r}")
        return value

    def texts(self, name: str) -> dict[str, str]:
        value = self.take(name)
        if not isinstance(value, dict) or not value:
            self.refuse(name, f"expected `NAME: PATH` entries, found {value!r}")
        for key, text in value.items():
            if not isinstance(key, str) or not isinstance(text, str) or not key or not text:
                self.refuse(name, f"expected `NAME: PATH` entries, found {key!r}: {text!r}")
        return value

    def paths(self, name: str) -> dict[str, str]:
        return {key: str(self.path.parent / text) for key, text in self.texts(name).items()}

    def integers(self, name: str) -> list[int]:
        values = self.take(name)
        if not isinstance(values, list) or any(type(v) is not int or v < 1 for v in values):
            self.refuse(name, f"expected a list of integers >= 1, found {values!r}")
        return values

    def schedule(self, seq_length: int) -> BatchSchedule:
        name = "step_batch_size_schedule"
        try:
            if name not in self.values:
                name = "rampup_batch_size"
                size = self.integer("global_batch_size")
                if name not in self.values:
                    return BatchSchedule([(0, size)])
                return ramp_up(size, self.integers(name))
            for other in ("global_batch_size", "rampup_batch_size"):
                if other in self.values:
                    self.refuse(other, f"give either this or {name}")
            return step_sizes(self.text(name), seq_length)
        except _ScheduleError as error:
            self.refuse(name, str(error))

    def steps(self, schedule: BatchSchedule) -> int:
        if ("train_steps" in self.values) == ("train_samples" in self.values):
            self.refuse("train_steps", "expected either this or train_samples")
        if "train_steps" in self.values:
            return self.integer("train_steps")
        samples = self.integer("train_samples")
        steps = schedule.step_of_row(samples) - 1  # row number `samples` is the first left out
        if steps < 1:
            self.refuse("train_samples", f"{samples} is less than one batch")
        return steps

    def checkpoints(self) -> tuple[int, ...]:
        if "checkpoint_dir" not in self.values:
            named = self.integers("checkpoints") if "checkpoints" in self.values else []
            return tuple(sorted(set(named)))
        if "checkpoints" in self.values:
            self.refuse("checkpoints", "give either this or checkpoint_dir")
        folder = self.path.parent / self.text("checkpoint_dir")
        if not folder.is_dir():
            self.refuse("checkpoint_dir", f"{folder} is not a folder")
        names = (re.fullmatch(r"iter_(\d{7,})", entry.name) for entry in folder.iterdir())
        found = tuple(sorted(int(match[1]) for match in names if match))
        if not found:
            self.refuse("checkpoint_dir", f"{folder} has no iter_0000000 folders")
        return found
