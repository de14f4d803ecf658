"""Kill a run that writes its ledger and checkpoints, at random times; prints what was met.

A program of its own, because it forks: a test process may have threads. The run's checkpoints are
files with a head, published as real ones are. It prints, as JSON, the kills, the restarts that met
torn bytes or an interrupted fork, and the number of forks.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_ettin.order.ledger import Head, Kind, Ledger, LedgerWriter
from tests.unit.ledgers import START, append_event, append_steps, digests

KILLS = 150
EVERY = 7


def checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("step_*.json"))


def publish(run: Path, step: int, head: Head) -> None:
    unfinished = run / "unfinished"
    with unfinished.open("w") as file:
        json.dump([step, *head], file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(run / f"step_{step:06d}.json")
    folder = os.open(run, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def split_writes(chance: random.Random) -> None:
    """Let the system take what is appended in pieces, with a pause in which a kill may come."""
    write = os.write

    def piece(descriptor: int, content: bytes) -> int:
        if len(content) > 1 and chance.random() < 0.5:
            done = write(descriptor, content[: chance.randrange(1, len(content))])
            time.sleep(chance.uniform(0, 0.001))
            return done
        return write(descriptor, content)

    os.write = piece  # type: ignore[assignment]


def train(run: Path, seed: int, last_step: int | None) -> None:
    """Resume at the newest checkpoint, as a run does, and go on to `last_step` or for ever."""
    chance = random.Random(seed)
    split_writes(chance)
    step, at = 0, None
    if checkpoints(run):
        step, *head = json.loads(checkpoints(run)[-1].read_text())
        at = Head(*head)
    with LedgerWriter.open(run / "ledger", at) as writer:
        if at is None:
            append_event(writer, Kind.START, 0, START)
        while step != last_step:
            due = EVERY - step % EVERY
            count = min(chance.randrange(1, 5), due, (last_step or step + due) - step)
            append_steps(writer, step + 1, count)
            step += count
            if step % EVERY == 0:
                append_event(writer, Kind.CHECKPOINT, step, {"name": f"step_{step}"})
                publish(run, step, writer.sync())
        writer.sync()


def in_child(run: Path, seed: int, last_step: int | None) -> int:
    """Return the id of a process that has begun to train."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writable, b"1")
            train(run, seed, last_step)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os.read(readable, 1)
    os.close(readable)
    os.close(writable)
    return child


def parts(folder: Path) -> Iterator[Ledger]:
    """Yield the ledger, its forks and theirs, each verified."""
    pending = [Ledger.read(folder)]
    while pending:
        ledger = pending.pop()
        yield ledger
        pending.extend(ledger.read_fork(fork) for fork in ledger.forks())


def check(run: Path) -> Ledger:
    """Hold what a kill left against the invariants; return the ledger."""
    ledger = Ledger.read(run / "ledger")
    for path in checkpoints(run):
        step, *head = json.loads(path.read_text())
        assert ledger.holds(Head(*head)), f"the ledger is behind the checkpoint of step {step}"
    return ledger


def main(run: Path) -> None:
    chance = random.Random(0)
    met = {"kills": 0, "torn": 0, "interrupted": 0}
    while met["kills"] < KILLS:
        child = in_child(run, met["kills"], None)
        time.sleep(chance.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGKILL, f"the run ended by itself with {status}"
        met["kills"] += 1
        if (run / "ledger" / "records.led").exists() and (run / "ledger" / "events.jsonl").exists():
            ledger = check(run)
            met["torn"] += ledger.torn_bytes + ledger.torn_event_bytes > 0
            met["interrupted"] += (run / "ledger" / "forks" / "pending.json").exists()
        if chance.random() < 0.1:  # somebody goes back further
            for path in checkpoints(run)[-chance.randrange(1, 4) :]:
                path.unlink()
    last = checkpoints(run)
    last_step = (int(last[-1].stem.split("_")[1]) if last else 0) + 20
    child = in_child(run, KILLS, last_step)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    compare(check(run), last_step)
    met["forks"] = sum(1 for _ in parts(run / "ledger")) - 1
    met["steps"] = last_step
    print(json.dumps(met))


def compare(ledger: Ledger, last_step: int) -> None:
    """Hold the STEP records against those of a run that nothing interrupted."""
    steps = ledger.steps
    assert steps["step"].tolist() == list(range(1, last_step + 1))
    assert np.array_equal(steps["order_digest"], digests(1, last_step, 2))
    assert np.array_equal(steps["token_digest"], digests(1, last_step, 2, 1))
    assert np.array_equal(steps["mask_digest"], digests(1, last_step, 1, 2)[:, 0])
    names = [checkpoint.payload["name"] for checkpoint in ledger.checkpoints()]
    assert names == [f"step_{step}" for step in range(EVERY, last_step + 1, EVERY)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
