"""Ledgers for the tests: runs whose steps are a function of their number."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.order.ledger import Head, Kind, LedgerWriter

ROWS = 8
START = {"order_id": "ab" * 32, "objective": "mlm", "seeds": {"mask": 7}, "world_size": 2}


def digests(first: int, count: int, lanes: int, salt: int = 0) -> NDArray[np.uint64]:
    """Return [count, lanes] numbers that follow from the steps and the salt alone."""
    values = [
        hashlib.sha256(f"{salt}:{step}:{lane}".encode()).digest()[:8]
        for step in range(first, first + count)
        for lane in range(lanes)
    ]
    return np.frombuffer(b"".join(values), "<u8").reshape(count, lanes).astype(np.uint64)


def append_steps(writer: LedgerWriter, first: int, count: int, salt: int = 0) -> None:
    """Append steps `first` to `first + count - 1`, of ROWS rows each; step 1 begins at row 0."""
    step = np.arange(first, first + count)
    writer.append_steps(
        step,
        np.zeros(count, np.int64),
        (step - 1) * ROWS,
        step * ROWS,
        step * 3 + salt,
        digests(first, count, 2, salt),
        digests(first, count, 2, salt + 1),
        digests(first, count, 1, salt + 2)[:, 0],
    )


def append_event(writer: LedgerWriter, kind: Kind, step: int, payload: dict[str, object]) -> None:
    """Append a record without rows after `step`."""
    writer.append(kind, step=step, g_begin=step * ROWS, g_end=step * ROWS, payload=payload)


def write_run(folder: Path, steps: int, every: int, salt: int = 0) -> dict[int, Head]:
    """Write a ledger with a CHECKPOINT record every so many steps; return their heads by step."""
    heads = {}
    with LedgerWriter.open(folder) as writer:
        append_event(writer, Kind.START, 0, START)
        for step in range(1, steps + 1):
            append_steps(writer, step, 1, salt)
            if step % every == 0:
                append_event(writer, Kind.CHECKPOINT, step, {"name": f"step_{step}"})
                heads[step] = writer.sync()
        writer.sync()
    return heads
