"""A choice of the configuration is taken apart by an exhaustive `match`, so a new one is noticed.

`if hardware.recompute == "full"` takes a third value for the first without a word. A `match` whose
last case is `assert_never` fails in mypy, and at run time if mypy was not asked.
"""

import ast
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_ettin.config import RunConfig
from megatron_ettin.objectives import Objective

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "megatron_ettin").rglob("*.py"))


def parts(hint: Any) -> Iterator[Any]:
    """Yield a type and all types that it is made of."""
    yield hint
    for part in typing.get_args(hint):
        if typing.get_origin(hint) is not Literal:
            yield from parts(part)


def choices(section: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (name, values) of each field below `section` that takes one of some words."""
    for name, hint in typing.get_type_hints(section).items():
        for part in parts(hint):
            if typing.get_origin(part) is Literal:
                yield name, typing.get_args(part)
            elif dataclasses.is_dataclass(part) and part is not Objective:
                yield from choices(part)


#: By field: the words that it takes. Objectives and orders have none.
WORDS: dict[str, set[str]] = {}
for field, values in choices(RunConfig):
    WORDS.setdefault(field, set()).update(values)


def field_of(node: ast.expr) -> str | None:
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
    return name if name in WORDS else None


def words_in(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and type(n.value) is str}


def is_exhaustive(node: ast.Match) -> bool:
    last = node.cases[-1]
    return ast.unparse(last.pattern) == "_" and "assert_never(" in ast.unparse(last)


def half_taken(source: str) -> list[str]:
    """List comparisons of a choice with one of its words, and matches that leave words out."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            words = set().union(*map(words_in, sides))
            if any(words & WORDS[name] for side in sides if (name := field_of(side))):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Match):
            name = field_of(node.subject)
            if name and words_in(node) & WORDS[name] and not is_exhaustive(node):
                found.append(f"line {node.lineno}: match {ast.unparse(node.subject)}")
    return found


def test_choices_of_the_configuration_are_found() -> None:
    assert {"pack", "lr_decay", "name", "precision", "fp8_recipe", "recompute"} <= WORDS.keys()
    assert WORDS["specials"] == {"add", "present"}


def test_choices_are_taken_apart_exhaustively() -> None:
    found = {path.relative_to(ROOT): half_taken(path.read_text()) for path in SOURCES}
    advice = "use `match` with `case _: assert_never(...)`, or ask a property that does"
    assert {str(path): lines for path, lines in found.items() if lines} == {}, advice


@pytest.mark.parametrize(
    "source",
    [
        "x = 1 if hardware.recompute == 'full' else 0",
        "if 'fp8' != self.hardware.precision: pass",
        "if precision in ('fp8', 'auto'): pass",
        "match phase.pack:\n    case 'bfd': pass",
        "match phase.pack:\n    case 'bfd': pass\n    case _: pass",
    ],
)
def test_half_taken_choice_is_found(source: str) -> None:
    assert len(half_taken(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "if task.name == 'beir': pass",  # not a choice of the configuration
        "if hardware.precision == other.precision: pass",
        "match c.pack:\n    case 'bfd': pass\n    case _:\n        assert_never(c.pack)",
    ],
)
def test_plain_comparison_is_not_found(source: str) -> None:
    assert half_taken(source) == []
