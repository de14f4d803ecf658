"""Stages that overlap: order, errors, ends."""

import itertools
import math
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing

import pytest

from megatron_ettin.data.pipeline import map_in_threads, prefetch


def never(item: int) -> bool:
    return False


def always(item: object) -> bool:
    return True


def slow_square(number: int) -> int:
    time.sleep(0.001 * (number % 3))
    return number * number


def test_results_come_in_order_from_several_threads() -> None:
    both = threading.Barrier(2, timeout=30)

    def meet(number: int) -> int:
        both.wait()  # only another thread's call lets this one go on
        return slow_square(number)

    assert list(map_in_threads(meet, range(50), 2, never)) == [n * n for n in range(50)]
    assert list(map_in_threads(slow_square, [], 2, never)) == []


def test_few_items_are_taken_ahead() -> None:
    taken = itertools.count()
    with closing(map_in_threads(slow_square, taken, 2, never)) as results:
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
        found.extend(map_in_threads(fail, range(20), 3, never))
    results = map_in_threads(fail, range(20), 3, never)
    for number in range(at):
        assert next(results) == number


def test_no_thread_stays() -> None:
    before = threading.active_count()
    with closing(
        prefetch(map_in_threads(slow_square, itertools.count(), 2, never), never)
    ) as results:
        assert next(results) == 0
    deadline = time.monotonic() + 30
    while threading.active_count() > before:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


def test_nothing_is_computed_beside_a_large_item() -> None:
    """Items 3 and 4 are large; memory holds no other one while they are on their way."""
    held: list[int] = []

    def is_large(number: int) -> bool:
        return number in (3, 4)

    def read() -> Iterator[int]:
        for number in range(8):
            held.append(number)
            assert not any(map(is_large, held[:-1])), held
            yield number

    read_ahead = prefetch(read(), is_large)
    with closing(prefetch(map_in_threads(slow_square, read_ahead, 2, is_large),
                          lambda square: is_large(math.isqrt(square)))) as squares:  # fmt: skip
        found = []
        for square in squares:
            time.sleep(0.002)
            found.append(square)
            held.remove(math.isqrt(square))
    assert found == [n * n for n in range(8)]


def test_what_was_taken_is_not_held() -> None:
    class Document:
        """Stand for a text of which Python says when it is gone."""

    def read() -> Iterator[Document]:
        for _ in range(6):
            document = [Document()]
            alive.append(weakref.ref(document[0]))
            yield document.pop()

    alive: list[weakref.ref[Document]] = []
    with closing(
        prefetch(map_in_threads(lambda d: d, prefetch(read(), always), 2, always), always)
    ) as documents:
        for document in documents:
            assert sum(each() is not None for each in alive) == 1
            del document


def test_an_unwanted_large_item_does_not_keep_the_thread() -> None:
    before = threading.active_count()
    with closing(prefetch(itertools.count(), always)) as numbers:
        assert next(numbers) == 0
    assert threading.active_count() == before
