"""Stages that overlap: order, errors, ends."""

import itertools
import threading
import time
from contextlib import closing

import pytest

from megatron_ettin.data.pipeline import map_in_threads, prefetch


def slow_square(number: int) -> int:
    time.sleep(0.001 * (number % 3))
    return number * number


def test_results_come_in_order_from_several_threads() -> None:
    both = threading.Barrier(2, timeout=30)

    def meet(number: int) -> int:
        both.wait()  # only another thread's call lets this one go on
        return slow_square(number)

    assert list(map_in_threads(meet, range(50), 2)) == [n * n for n in range(50)]
    assert list(map_in_threads(slow_square, [], 2)) == []


def test_few_items_are_taken_ahead() -> None:
    taken = itertools.count()
    with closing(map_in_threads(slow_square, taken, 2)) as results:
        assert next(results) == 0
    assert next(taken) <= 3


@pytest.mark.parametrize("at", [0, 7])
def test_an_error_of_the_function_is_raised_after_the_results_before_it(at: int) -> None:
    def fail(number: int) -> int:
        if number == at:
            raise ValueError("bad item")
        return number

    found = []
    with pytest.raises(ValueError, match="bad item"):
        found.extend(map_in_threads(fail, range(20), 3))
    results = map_in_threads(fail, range(20), 3)
    for number in range(at):
        assert next(results) == number


def test_no_thread_stays() -> None:
    before = threading.active_count()
    with closing(prefetch(map_in_threads(slow_square, itertools.count(), 2))) as results:
        assert next(results) == 0
    deadline = time.monotonic() + 30
    while threading.active_count() > before:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)
