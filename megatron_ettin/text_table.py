"""Tables as plain text: the one way in which commands print columns.

Lines are as wide as their content, so that `grep`, `cut` and a pipe see whole rows on any terminal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

GAP = "  "


def text_table(
    names: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Collection[str] = ()
) -> Iterator[str]:
    """Yield the lines of a table: names of the columns, a rule, rows; `numbers` align right."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    is_right = [name in numbers for name in names]
    return _lines([names, rule, *rows], widths, is_right)


def text_facts(facts: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield a line for each fact: its name, its value; the values begin in one column."""
    width = max((len(name) for name, _ in facts), default=0)
    return _lines(facts, [width, 0], [False, False])


def _lines(
    rows: Sequence[Sequence[str]], widths: Sequence[int], is_right: Sequence[bool]
) -> Iterator[str]:
    for row in rows:
        cells = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, is_right, strict=True)
        )
        yield GAP.join(cells).rstrip()
