"""Long lists of numbers in an answer are printed as textwrap and json print them, only sooner."""

import json
import random
import textwrap
from dataclasses import dataclass

import numpy as np
import pytest

from megatron_ettin.queries.answer import WIDTH, as_json, as_text


@dataclass(frozen=True, kw_only=True)
class Lists:
    run: str
    ids: list[int]
    names: list[str]
    labels: list[int | None]


def wrapped(words: list[str]) -> str:
    return textwrap.fill(
        " ".join(words), WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False
    )


@pytest.mark.parametrize("seed", range(200))
def test_numbers_are_wrapped_as_words_are(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 80)
    # Some are longer than a line.
    ids = [
        draw.choice([1, -1]) * 10 ** draw.randint(0, draw.choice([3, 40, 120]))
        for _ in range(count)
    ]
    labels = [value if value > 0 else None for value in ids]
    answer = Lists(run="there", ids=ids, names=["a", "b c"], labels=labels)
    expected = [
        *("run  there", "ids:", wrapped([str(value) for value in ids]), "names:", "  a b c"),
        *("labels:", wrapped(["-" if value is None else str(value) for value in labels])),
    ]
    assert as_text(answer) == "\n".join(expected)
    assert json.loads(as_json(answer)) == {
        "run": "there",
        "ids": ids,
        "names": ["a", "b c"],
        "labels": labels,
    }


def test_types_that_json_lacks_become_text() -> None:
    answer = Lists(run="there", ids=[np.int64(3), True], names=[b"\x0f", None], labels=[])  # type: ignore[list-item]
    assert json.loads(as_json(answer)) == {
        "run": "there",
        "ids": ["3", True],
        "names": ["0f", None],
        "labels": [],
    }
    assert "\nids:\n  3 yes\nnames:\n  0f -\nlabels:\n  none" in as_text(answer)
