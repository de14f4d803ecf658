"""Stages that overlap: one iterator runs in a thread ahead of the other."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Items that wait between two stages: enough to hide that their times vary.
DEPTH = 2


class _End(NamedTuple):
    """End of a stage, and the error that ended it."""

    error: BaseException | None


class _Handover(Generic[Item]):
    """Queue between the thread of a stage and its consumer; holds nothing that was taken from it.

    After a large item the thread waits until the consumer has taken it and asks for another one.
    """

    def __init__(self, is_large: Callable[[Item], bool]) -> None:
        self._is_large = is_large
        self._changed = threading.Condition()
        self._ready: deque[Item | _End] = deque()
        self._asked = False
        """The consumer waits, and nothing is ready."""
        self._closed = False

    def fill(self, items: Iterable[Item]) -> None:
        """Put all items and their end, until the consumer closes."""
        try:
            for item in items:
                large = self._is_large(item)
                self._put(item)
                del item
                with self._changed:
                    if large:
                        self._changed.wait_for(lambda: self._closed or self._asked)
                    if self._closed:
                        return
            self._put(_End(None))
        except BaseException as error:
            self._put(_End(error))

    def _put(self, item: Item | _End) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < DEPTH)
            self._ready.append(item)
            self._asked = False
            self._changed.notify()

    def items(self) -> Generator[Item, None, None]:
        """Yield what was put, up to its end; raise the error that ended it."""
        while not isinstance(item := self._take(), _End):
            yield item
            del item
        if item.error is not None:
            raise item.error

    def _take(self) -> Item | _End:
        with self._changed:
            self._asked = not self._ready
            self._changed.notify()
            self._changed.wait_for(lambda: self._ready)
            item = self._ready.popleft()
            self._changed.notify()
            return item

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()


def prefetch(
    items: Iterable[Item], is_large: Callable[[Item], bool]
) -> Generator[Item, None, None]:
    """Yield the items in order, while a thread computes the next ones; `DEPTH` of them wait.

    Nothing is computed beside a large item: the next one begins when this generator is asked for
    it. An error of the items is raised here. The thread ends with this generator, so close it.
    """
    handover = _Handover(is_large)
    thread = threading.Thread(target=handover.fill, args=[items], name="prefetch", daemon=True)
    thread.start()
    try:
        yield from handover.items()
    finally:
        handover.close()
        thread.join()


def map_in_threads(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    num_threads: int,
    is_large: Callable[[Item], bool],
) -> Generator[Result, None, None]:
    """Yield the function of each item, in order, from threads; `num_threads` items are in work.

    After a large item, no other one is taken before all results are.

    The function should release Python's lock. Close the generator: it waits for the threads.
    """
    with ThreadPoolExecutor(num_threads, thread_name_prefix="map") as pool:
        begun: deque[Future[Result]] = deque()
        for item in items:
            begun.append(pool.submit(function, item))
            most = 0 if is_large(item) else num_threads
            del item
            while len(begun) > most:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
