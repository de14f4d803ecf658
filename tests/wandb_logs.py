"""Offline logs of Weights & Biases, read back."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Far above the time in which W&B's service writes a log.
DEADLINE_SECONDS = 120.0


def logged_losses(log: Path) -> list[float]:
    """Read the training losses back from an offline Weights & Biases run."""
    losses = []
    for record in parsed_records(log):
        items = {
            (item.key or "/".join(item.nested_key)): json.loads(item.value_json)
            for item in record.history.item
        }
        if "loss" in items:
            losses.append(items["loss"])
    return losses


def logged_ids(log: Path) -> set[str]:
    """Read the ids of the W&B runs that an offline log is of."""
    return {record.run.run_id for record in parsed_records(log) if record.HasField("run")}


def logged_config(log: Path) -> dict[str, Any]:
    """Read the configuration of the W&B run back, by its first names."""
    found: dict[str, Any] = {}
    for record in parsed_records(log):
        if record.HasField("run"):
            for item in record.run.config.update:
                assert item.key, f"a nested key: {list(item.nested_key)}"
                found[item.key] = json.loads(item.value_json)
    return found


def parsed_records(log: Path) -> list[Any]:
    """Return the records of an offline log whose run has finished; the last one is its exit.

    W&B's service still writes for a while after `finish` has returned.
    """
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (records := list(_parsed(log))) or not records[-1].HasField("exit"):
        assert time.monotonic() < deadline, f"{log}: {len(records)} records, and no exit"
        time.sleep(0.02)
    return records


def _parsed(log: Path) -> Iterator[Any]:
    """Yield the whole records of a log, to which the service may still append."""
    from wandb.proto import wandb_internal_pb2

    for content in log_records(log.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        yield record


def log_records(content: bytes) -> Iterator[bytes]:
    """Split a .wandb file: LevelDB's log format (blocks of 32 KiB) behind a header of 7 bytes."""
    assert b":W&B".startswith(content[:4])
    header, block, at = 7, 32_768, 7
    pending = b""
    while at + header <= len(content):
        if block - at % block < header:
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        at += header
        if at + length > len(content):  # the rest is still to come
            return
        pending += content[at : at + length]
        at += length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield pending
            pending = b""
