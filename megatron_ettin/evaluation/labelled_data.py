"""Texts with labels, as GLUE has them: a local folder of splits, or a data set of the Hub."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ettin.data.json_lines import read_json_lines
from megatron_ettin.data.lines import read_lines
from megatron_ettin.data.text_records import MAX_CSV_FIELD_CHARACTERS

#: Number of classes that a message lists.
MAX_NAMES = 20


class Example(NamedTuple):
    """One text, or a pair of texts, with its label."""

    id: str
    """Name of the split and number of the row, from 1."""
    texts: tuple[str, ...]
    label: str
    """Name of the class, or a number."""
    where: str
    """File and line, for messages."""


@dataclass(frozen=True, kw_only=True)
class LabelledData:
    """A data set with splits for training, for choosing settings, and maybe for the report."""

    path: str
    """Folder with a file SPLIT.jsonl, .parquet, .csv or .tsv for each split, or name of a data set
    of the Hugging Face Hub. A .tsv file has no quoting, as GLUE's have none."""
    config_name: str | None = None
    """Configuration of a data set of the Hub, such as `mnli`."""
    text_fields: Sequence[str] = ("sentence",)
    """Field of the text, or the two fields of a pair."""
    label_field: str = "label"
    """Field of a class's name or number, or of a number to predict."""
    train: str = "train"
    """Split that models are trained on."""
    validation: str = "validation"
    """Split that settings are chosen on."""
    test: str | None = None
    """Split that is reported; None: `validation` is, for want of a labelled test split."""

    def __post_init__(self) -> None:
        if len(self.text_fields) not in {1, 2}:
            raise ValueError(
                f"text_fields: {list(self.text_fields)}: expected one field, or two for pairs"
            )
        if len(set(self.splits)) < len(self.splits):
            raise ValueError(f"splits: {', '.join(self.splits)}: one is named twice")

    @property
    def splits(self) -> tuple[str, ...]:
        """Return the names of all splits, `train` first and the reported one last."""
        return (self.train, self.validation, *([self.test] if self.test else []))

    @property
    def reported(self) -> str:
        """Return the name of the split that scores are of."""
        return self.test or self.validation

    def files(self) -> list[Path]:
        """Return the files of a local folder; none for a data set of the Hub."""
        folder = Path(self.path)
        return [_split_file(folder, split) for split in self.splits] if folder.is_dir() else []

    def read(self, split: str) -> list[Example]:
        """Read a split.

        Raises:
            ValueError, OSError: the data is missing or malformed; the message names file and line.
        """
        folder = Path(self.path)
        rows = _local_rows(folder, split) if folder.is_dir() else self._hub_rows(split)
        examples = [
            self._example(f"{split}:{number}", where, row)
            for number, (where, row) in enumerate(rows, start=1)
        ]
        if not examples:
            raise ValueError(f"{self.path}: split {split} has no examples")
        return examples

    def _example(self, id_: str, where: str, row: Mapping[str, Any]) -> Example:
        for name in (*self.text_fields, self.label_field):
            if name not in row:
                fields = ", ".join(map(str, row))
                raise ValueError(f"{where}: no field {name}; there are {fields}")
        texts = tuple(row[name] for name in self.text_fields)
        for name, text in zip(self.text_fields, texts, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where}: field {name} is {text!r}; a text is needed")
        label = row[self.label_field]
        if isinstance(label, bool) or not isinstance(label, str | int | float) or label == "":
            raise ValueError(
                f"{where}: field {self.label_field} is {label!r}; a name or a number is needed"
            )
        return Example(id=id_, texts=texts, label=str(label), where=where)

    def _hub_rows(self, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        import datasets

        name = f"{self.path} {self.config_name or ''}".strip()
        try:
            rows = datasets.load_dataset(self.path, self.config_name, split=split)
        except (ValueError, OSError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{name}, split {split}: neither a folder nor a data set that can be had: {reason}"
            ) from error
        for number, row in enumerate(rows, start=1):
            yield f"{name}, split {split}, row {number}", row


def class_names(examples: Sequence[Example]) -> list[str]:
    """Return the distinct labels: numbers by value, names in alphabetical order."""
    names = {example.label for example in examples}
    if all(name.removeprefix("-").isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def class_numbers(examples: Sequence[Example], names: Sequence[str]) -> list[int]:
    """Return the index of each label in `names`; raise ValueError for an unknown one."""
    numbers = {name: number for number, name in enumerate(names)}
    for example in examples:
        if example.label not in numbers:
            known = ", ".join(names[:MAX_NAMES])
            raise ValueError(
                f"{example.where}: label {example.label} is none of the training split's: {known}"
            )
    return [numbers[example.label] for example in examples]


def label_values(examples: Sequence[Example]) -> list[float]:
    """Return labels that are numbers; raise ValueError for one that is not."""
    values = []
    for example in examples:
        try:
            value = float(example.label)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{example.where}: label {example.label} is no number")
        values.append(value)
    return values


def _local_rows(folder: Path, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    path = _split_file(folder, split)
    reader = next(reader for suffix, reader in READERS.items() if path.name.endswith(suffix))
    return reader(path)


def _split_file(folder: Path, split: str) -> Path:
    candidates = [folder / f"{split}{suffix}" for suffix in READERS]
    found = [path for path in candidates if path.is_file()]
    if not found:
        raise FileNotFoundError(
            f"{folder}: no file for split {split}; expected {split} with one of the suffixes "
            f"{', '.join(READERS)}"
        )
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ValueError(f"{folder}: {names} are both split {split}; keep one")
    return found[0]


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for line in read_json_lines(path):
        yield line.where, line.fields


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from _table_rows(path, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _tsv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from _table_rows(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _table_rows(
    path: Path, *, delimiter: str, quoting: Any
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(MAX_CSV_FIELD_CHARACTERS)
    with path.open("rb") as file:
        lines = (line for _, line in read_lines(path, file))
        rows = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
        first = 1
        header: list[str] | None = None
        try:
            for row in rows:
                if header is None:
                    header = row
                elif row:
                    if len(row) != len(header):
                        raise ValueError(
                            f"{path}:{first}: {len(row)} columns where the header has {len(header)}"
                        )
                    yield f"{path}:{first}", dict(zip(header, row, strict=True))
                first = rows.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path}:{first}: invalid table: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # Imported here: only this format needs it, and it costs 0.3 s.
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read as parquet after row {number}: {error}"
        ) from error


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Mapping[str, Any]]]]] = {
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
}
