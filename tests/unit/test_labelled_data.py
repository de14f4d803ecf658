"""Readers of labelled data: four formats alike, errors that name file and line."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_ettin.evaluation.labelled_data import (
    Example,
    LabelledData,
    class_names,
    class_numbers,
    label_values,
)

ROWS: list[dict[str, Any]] = [
    {"a": "One, two", "b": "Three", "label": 1},
    {"a": "Four", "b": 'A "quoted" word', "label": 0},
]


def write_jsonl(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_all_formats(folder: Path) -> None:
    write_jsonl(folder, "jsonl", ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "parquet.parquet")
    (folder / "csv.csv").write_text(
        'a,b,label\n"One, two",Three,1\nFour,"A ""quoted"" word",0\n', encoding="utf-8"
    )
    (folder / "tsv.tsv").write_text(
        'a\tb\tlabel\nOne, two\tThree\t1\nFour\tA "quoted" word\t0\n', encoding="utf-8"
    )


@pytest.mark.parametrize("split", ["jsonl", "parquet", "csv", "tsv"])
def test_formats_hold_the_same(split: str, tmp_path: Path) -> None:
    write_all_formats(tmp_path)
    found = LabelledData(path=str(tmp_path), text_fields=("a", "b")).read(split)
    assert [example.id for example in found] == [f"{split}:1", f"{split}:2"]
    assert [example.texts for example in found] == [(row["a"], row["b"]) for row in ROWS]
    assert [example.label for example in found] == ["1", "0"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b"}\n', r"x\.jsonl:2: no field"),
        ("x.jsonl", '\n{"sentence": "", "label": 1}\n', r"x\.jsonl:2: field sentence is ''"),
        ("x.jsonl", '{"sentence": "a", "label": null}\n', r"x\.jsonl:1: field label is None"),
        ("x.jsonl", "{\n", r"x\.jsonl:1: invalid JSON"),
        ("x.jsonl", "[1]\n", r"x\.jsonl:1: a JSON object"),
        ("x.csv", 'sentence,label\n"a\nb",1\nc\n', r"x\.csv:4: 1 columns where the header has 2"),
        ("x.csv", 'sentence,label\n"a"b,1\n', r"x\.csv:2: invalid table"),
        ("x.tsv", "text\tlabel\na\t1\n", r"x\.tsv:2: no field sentence; there are text, label"),
        ("x.parquet", "no parquet", r"x\.parquet: cannot be read as parquet after row 0"),
        ("x.jsonl", "", "split x has no examples"),
        ("y.jsonl", "", "no file for split x"),
    ],
)
def test_errors_name_the_place(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        LabelledData(path=str(tmp_path)).read("x")


def test_two_files_of_a_split_are_refused(tmp_path: Path) -> None:
    for suffix in ("jsonl", "csv"):
        (tmp_path / f"train.{suffix}").touch()
    with pytest.raises(ValueError, match="are both split train; keep one"):
        LabelledData(path=str(tmp_path)).read("train")


def test_missing_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nobody/nothing mnli, split train: neither a folder nor"):
        LabelledData(path="nobody/nothing", config_name="mnli").read("train")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_fields": ("a", "b", "c")}, "expected one field"),
        ({"test": "validation"}, "one is named twice"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelledData(path="x", **fields)


def examples(*labels: str) -> list[Example]:
    return [
        Example(id=f"x:{line}", texts=("a",), label=label, where=f"x.jsonl:{line}")
        for line, label in enumerate(labels, start=1)
    ]


def test_classes_are_ordered_by_number_or_name() -> None:
    assert class_names(examples("10", "9", "-1", "9")) == ["-1", "9", "10"]
    assert class_names(examples("b", "10", "a")) == ["10", "a", "b"]
    assert class_numbers(examples("b", "a", "b"), ["a", "b"]) == [1, 0, 1]


def test_unknown_labels_name_their_line() -> None:
    with pytest.raises(ValueError, match=r"x\.jsonl:2: label c is none of .*: a, b"):
        class_numbers(examples("a", "c"), ["a", "b"])
    with pytest.raises(ValueError, match=r"x\.jsonl:2: label nan is no number"):
        label_values(examples("2.5", "nan"))
    assert label_values(examples("2.5", "-1")) == [2.5, -1.0]
