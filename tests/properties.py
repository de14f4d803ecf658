"""Checks of properties: the same random cases in every run, few of them or ten thousand."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

Strategy = Any


def cases(quick: int) -> pytest.MarkDecorator:
    """Give a test the argument `count`: `quick`, and 10,000 where long tests were asked for."""
    return pytest.mark.parametrize("count", [quick, pytest.param(10_000, marks=pytest.mark.long)])


def check_all(check: Callable[..., None], count: int, *strategies: Strategy) -> None:
    """Call `check` with `count` random cases; one that fails is made smaller and printed."""
    settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )(given(*strategies)(check))()
