"""Crash a ledger's return to a checkpoint before each of its system calls, and open it again.

A program of its own, because it forks: a test process may have threads. Prints the number of
crashes for each place to which it returns.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from megatron_ettin.order.ledger import Head, Kind, Ledger, LedgerWriter
from tests.unit.ledgers import START, append_event, write_run

CALLS = ("write", "fsync", "fdatasync", "ftruncate", "replace", "unlink")


def go_back(folder: Path, at: Head | None) -> None:
    writer = LedgerWriter.open(folder, at)
    if at is None:
        append_event(writer, Kind.START, 0, START)
    writer.close()


def crash_at(number: int) -> None:
    """End the process at the given call; a write is half done then."""
    counter = count()

    def crashing(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if next(counter) == number:
                if call is write:
                    write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os._exit(9)
            return call(*arguments, **options)

        return counted

    write = os.write
    for name in CALLS:
        setattr(os, name, crashing(getattr(os, name)))


def in_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def crash_everywhere(base: Path, at: Head | None, other: Head | None) -> int:
    """Compare each crash's outcome with that of no crash; return how many there were."""
    whole, work = base.with_name("whole"), base.with_name("work")
    shutil.copytree(base, whole)
    go_back(whole, at)
    for number in count():
        shutil.copytree(base, work)

        def interrupted(number: int = number) -> None:
            crash_at(number)
            go_back(work, at)

        status = in_child(interrupted)
        assert status in (0, 9), status
        Ledger.read(work)  # a reader finds no fault either
        if status == 9 and other is not None and other != at:
            shutil.copytree(work, base.with_name("elsewhere"))
            return_elsewhere(base, base.with_name("elsewhere"), other)
        go_back(work, at)
        assert status == 0 or at is None or snapshot(work) == snapshot(whole), number
        starts = sum(int((part.records["kind"] == Kind.START).sum()) for part in parts(work))
        assert starts >= (2 if at is None else 1)
        shutil.rmtree(work)
        if status == 0:
            shutil.rmtree(whole)
            return number
    raise AssertionError


def parts(folder: Path) -> Iterator[Ledger]:
    """Yield the ledger, its forks and theirs, each verified."""
    pending = [Ledger.read(folder)]
    while pending:
        ledger = pending.pop()
        yield ledger
        pending.extend(ledger.read_fork(fork) for fork in ledger.forks())


def return_elsewhere(base: Path, folder: Path, other: Head) -> None:
    """Open at an earlier head after the crash: every record is still in the ledger or a fork."""
    go_back(folder, other)
    left = {chain.tobytes() for part in parts(folder) for chain in part.records["chain"]}
    original = {chain.tobytes() for chain in Ledger.read(base).records["chain"]}
    assert original <= left, "records were lost"
    shutil.rmtree(folder)


def main(folder: Path) -> None:
    time.time_ns = lambda: 1_700_000_000_000_000_000  # outcomes are compared byte for byte
    os.fsync = os.fdatasync = lambda _: None  # places to crash, but the power stays on
    base = folder / "base"
    heads = write_run(base, 15, 5)
    print(crash_everywhere(base, heads[10], heads[5]))
    print(crash_everywhere(base, heads[5], heads[5]))
    print(crash_everywhere(base, None, None))
    with (base / "records.led").open("ab") as file:  # and once more with a torn end
        file.write(b"torn" * 10)
    print(crash_everywhere(base, heads[10], heads[5]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
