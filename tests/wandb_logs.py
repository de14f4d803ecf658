"""Offline logs of Weights & Biases, read back."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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


def parsed_records(log: Path) -> Iterator[Any]:
    """Yield the records of an offline log."""
    from wandb.proto import wandb_internal_pb2

    for content in log_records(log.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        yield record


def log_records(content: bytes) -> Iterator[bytes]:
    """Split a .wandb file: LevelDB's log format (blocks of 32 KiB) behind a header of 7 bytes."""
    assert content[:4] == b":W&B"
    header, block, at = 7, 32_768, 7
    pending = b""
    while at + header <= len(content):
        if block - at % block < header:
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        at += header
        pending += content[at : at + length]
        at += length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield pending
            pending = b""
