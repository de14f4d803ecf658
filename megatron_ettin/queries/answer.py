"""Options that questions share, verdicts and faults, and printing as text or JSON.

An answer is a dataclass. A field holds a number, a string, a list of either, a dataclass, or a
table: an Arrow table, or a list of dataclasses whose fields are numbers and strings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from megatron_ettin.text_table import text_facts, text_table

WIDTH = 100
"""Columns of a line of text."""

PASS, FAIL = "PASS", "FAIL"

#: Faults that a check lists one by one; it counts the rest.
FAULTS_KEPT = 20


@runtime_checkable
class ArrowTable(Protocol):
    """The part of `pyarrow.Table` that printing needs; most questions never import Arrow."""

    column_names: list[str]
    columns: list[Any]

    def to_pylist(self) -> list[dict[str, Any]]:
        """Return each row as a dict of its columns."""
        ...


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something wrong, and its place; None if it belongs to no record, step or row."""

    what: str
    seq: int | None = None
    """Number of the ledger record."""
    step: int | None = None
    rows: tuple[int, int] | None = None
    """Rows [begin, end) of the record."""
    row: int | None = None
    """Row g, if the fault is known to be in this one row."""

    def __str__(self) -> str:
        places = [
            f"{name} {value}"
            for name, value in (("record", self.seq), ("step", self.step), ("row", self.row))
            if value is not None
        ]
        if self.rows is not None and self.row is None:
            places.append(f"rows [{self.rows[0]}, {self.rows[1]})")
        return f"{', '.join(places)}: {self.what}" if places else self.what


@dataclass(kw_only=True)
class Check:
    """A check that `verify` makes, with its result so far."""

    name: str
    items: int = 0
    """Records compared; `chain` also counts forks' records, lines of metrics, checkpoints."""
    failures: int = 0
    faults: list[Fault] = field(default_factory=list)
    """The first FAULTS_KEPT failures."""
    notes: list[str] = field(default_factory=list)

    def fail(
        self,
        what: str,
        *,
        seq: int | None = None,
        step: int | None = None,
        rows: tuple[int, int] | None = None,
        row: int | None = None,
    ) -> None:
        """Count a failure; keep it as a fault if fewer than FAULTS_KEPT are kept."""
        self.failures += 1
        if len(self.faults) < FAULTS_KEPT:
            self.faults.append(Fault(what=what, seq=seq, step=step, rows=rows, row=row))


def add_shared_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """Add --run, --json, and the example at the end of the help."""
    parser.epilog = f"example: python tools/order.py {example}"
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run_dir of a run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_two_runs(
    parser: argparse.ArgumentParser, example: str, *, times: str = "give it twice"
) -> None:
    """Add --run (given several times), --json, and the example at the end of the help."""
    parser.epilog = f"example: python tools/order.py {example}"
    add = parser.add_argument
    run = f"run_dir of a run; {times}"
    add("--run", type=Path, action="append", required=True, metavar="DIR", help=run)
    add("--json", action="store_true", help="print one JSON object")


def two_runs(args: argparse.Namespace) -> tuple[Path, Path]:
    """Return the two run folders; raise ValueError if --run was not given twice."""
    if len(args.run) != 2:
        raise ValueError(f"--run: give it twice, not {len(args.run)} times")
    return args.run[0], args.run[1]


def several_runs(args: argparse.Namespace) -> list[Path]:
    """Return the run folders; raise ValueError if --run was not given twice or more."""
    if len(args.run) < 2:
        raise ValueError(f"--run: give it twice or more, not {len(args.run)} times")
    return list(args.run)


def show(answer: Any, args: argparse.Namespace) -> int:
    """Print an answer, as JSON if `args.json` is set; return exit status 0."""
    print(as_json(answer) if args.json else as_text(answer))
    return 0


def as_json(answer: Any) -> str:
    """Return one JSON object; bytes become hexadecimal, other types that JSON lacks become text."""
    return json.dumps(_plain(answer), ensure_ascii=False)


def as_text(answer: Any) -> str:
    """Return lines for people: values, then tables. Fields that are None are left out."""
    return "\n".join(_blocks(answer))


def _plain(value: Any) -> Any:
    if type(value) in _JSON_FACTS:  # first, since a batch has millions of them
        return value
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, ArrowTable):
        return _plain(value.to_pylist())
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return _plain_fact(value)


#: Types that JSON has, of values that stand alone.
_JSON_FACTS = frozenset({bool, int, float, str, type(None)})


def _plain_fact(value: Any) -> bool | int | float | str | None:
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return value.hex()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _blocks(value: Any) -> Iterator[str]:
    fields = {f.name.replace("_", " "): getattr(value, f.name) for f in dataclasses.fields(value)}
    fields = {name: entry for name, entry in fields.items() if entry is not None}
    facts = {name: entry for name, entry in fields.items() if _is_fact(entry)}
    yield from text_facts([(name, _cell(entry)) for name, entry in facts.items()])
    for name, entry in fields.items():
        if name in facts:
            continue
        if isinstance(entry, ArrowTable):
            yield from ("", *_table(entry.column_names, _rows_of(entry)))
        elif _is_table(entry):
            names = [f.name for f in dataclasses.fields(entry[0])]
            rows = [[getattr(row, column) for column in names] for row in entry]
            yield from ("", *_table([column.replace("_", " ") for column in names], rows))
        elif len(entry) and dataclasses.is_dataclass(entry[0]):
            for inner in entry:
                yield ""
                yield from ("  " + line if line else line for line in _blocks(inner))
        else:
            yield f"{name}:"
            if entry and all(type(item) is int for item in entry):
                yield from _filled(list(map(str, entry)))
                continue
            text = " ".join(_cell(item) for item in entry) or "none"
            yield textwrap.fill(
                text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False
            )


def _filled(words: Sequence[str]) -> Iterator[str]:
    """Yield lines of words as `textwrap.fill` makes them; it takes four times as long."""
    first, width = 0, 1
    for place, word in enumerate(words):
        width += 1 + len(word)
        if width > WIDTH and place > first:
            yield "  " + " ".join(words[first:place])
            first, width = place, 2 + len(word)
    yield "  " + " ".join(words[first:])


def _is_fact(value: Any) -> bool:
    return not isinstance(value, ArrowTable | list | tuple)


def _is_table(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and dataclasses.is_dataclass(value[0])
        and all(_is_fact(getattr(value[0], f.name)) for f in dataclasses.fields(value[0]))
    )


def _rows_of(table: ArrowTable) -> list[list[Any]]:
    columns = [column.to_pylist() for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    cells = [[_cell(value) for value in row] for row in rows]
    numbers = [
        name
        for i, name in enumerate(names)
        if all(isinstance(row[i], int | float | Decimal | None) for row in rows)
    ]
    return text_table(names, cells, numbers=numbers)


def _cell(value: Any) -> str:
    if type(value) is int:
        return str(value)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = _plain(value)
    return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
