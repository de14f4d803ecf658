"""Checkpoints as a run publishes them, without weights, for tests of what happens to them."""

import dataclasses
import json
from pathlib import Path

from megatron_ettin.checkpoint import RunState
from megatron_ettin.file_digests import FileDigest, FileList, sha256_of_json
from megatron_ettin.order.ledger import Ledger
from megatron_ettin.order.run_folder import CONFIG_FILE, STATE_FILE, RunFolder


def publish_recorded(run: RunFolder) -> list[Path]:
    """Give each CHECKPOINT record of a run's ledger a folder with two files and a state."""
    spec = run.read_order()
    folders = []
    for point in Ledger.read(run.ledger).checkpoints():
        folder = run.checkpoints / point.payload["name"]
        folder.mkdir(parents=True)
        contents = {CONFIG_FILE: run.config.read_bytes(), "__0_0.distcp": bytes(range(256)) * 64}
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        files = FileList({name: FileDigest.of_content(c) for name, c in contents.items()})
        state = RunState(
            g=point.g,
            step=point.step,
            consumed_tokens=point.payload["tokens"],
            phase=point.payload["phase"],
            phase_ids=tuple(spec.phase_ids()),
            phase_ends=tuple(spec.phase_ends()),
            ledger_seq=point.head.seq,
            ledger_chain=point.head.chain,
        )
        fields = {"versions": {}, **dataclasses.asdict(state)}
        document = {**files.to_document(), **fields, "state_sha256": sha256_of_json(fields)}
        (folder / STATE_FILE).write_text(json.dumps(document, indent=2) + "\n")
        folders.append(folder)
    return folders
