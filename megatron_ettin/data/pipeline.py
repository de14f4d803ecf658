"""Stages that overlap: one iterator runs in a thread ahead of the other."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Items that wait between two stages: enough to hide that their times vary.
DEPTH = 2
#: Seconds after which a stage looks whether its results are still wanted.
PATIENCE_SECONDS = 0.1


class _End(NamedTuple):
    """End of a stage, and the error that ended it."""

    error: BaseException | None


def prefetch(items: Iterable[Item]) -> Generator[Item, None, None]:
    """Yield the items in order, while a thread computes the next ones; `DEPTH` of them wait.

    An error of the items is raised here. The thread ends with this generator, so close it.
    """
    ready: queue.Queue[Item | _End] = queue.Queue(DEPTH)
    closed = threading.Event()

    def put(item: Item | _End) -> None:
        while not closed.is_set():
            try:
                ready.put(item, timeout=PATIENCE_SECONDS)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if closed.is_set():
                    return
            put(_End(None))
        except BaseException as error:
            put(_End(error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        closed.set()
        thread.join()


def map_in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int
) -> Generator[Result, None, None]:
    """Yield the function of each item, in order, from threads; `num_threads` items are in work.

    The function should release Python's lock. Close the generator: it waits for the threads.
    """
    with ThreadPoolExecutor(num_threads, thread_name_prefix="map") as pool:
        begun: deque[Future[Result]] = deque()
        for item in items:
            begun.append(pool.submit(function, item))
            if len(begun) > num_threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
