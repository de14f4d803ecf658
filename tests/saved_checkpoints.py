"""Checkpoints as a run publishes them, without weights, for tests of what happens to them."""

import dataclasses
import json
from pathlib import Path

from megatron_ettin.checkpoint import RunState
from megatron_ettin.file_digests import FileDigest, FileList, sha256_of_json
from megatron_ettin.order.ledger import Ledger
from megatron_ettin.order.run_folder import CONFIG_FILE, STATE_FILE, RunFolder


def saved_files(config: bytes) -> dict[str, bytes]:
    """Return the files of a checkpoint by name, without its state."""
    return {CONFIG_FILE: config, "__0_0.distcp": bytes(range(256)) * 64}


def list_files(contents: dict[str, bytes]) -> FileList:
    """Return the list of files that a checkpoint's state and record hold."""
    return FileList({name: FileDigest.of_content(c) for name, c in contents.items()})


def publish_recorded(run: RunFolder) -> list[Path]:
    """Give each CHECKPOINT record of a run's ledger a folder with two files and a state."""
    spec = run.read_order()
    folders = []
    for point in Ledger.read(run.ledger).checkpoints():
        folder = run.checkpoints / point.payload["name"]
        folder.mkdir(parents=True)
        contents = saved_files(run.config.read_bytes())
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        files = list_files(contents)
        state = RunState(
            g=point.g,
            step=point.step,
            consumed_tokens=point.payload["tokens"],
            phase=point.payload["phase"],
            phase_ids=tuple(spec.phase_ids()),
            phase_ends=tuple(spec.phase_ends()),
            order_digest=_lanes(point.payload["order_digest"]),
            token_digest=_lanes(point.payload["token_digest"]),
            ledger_seq=point.head.seq,
            ledger_chain=point.head.chain,
        )
        fields = {"versions": {}, **dataclasses.asdict(state)}
        document = {**files.to_document(), **fields, "state_sha256": sha256_of_json(fields)}
        (folder / STATE_FILE).write_text(json.dumps(document, indent=2) + "\n")
        folders.append(folder)
    return folders


def _lanes(digest: str) -> tuple[int, int]:
    """Return a digest of the ledger as (low, high)."""
    return int(digest[16:], 16), int(digest[:16], 16)
