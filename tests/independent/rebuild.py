"""Rebuild a run from its folder and its corpora, by docs/order.md and docs/ledger.md alone.

No module of this folder imports anything of the project. This program verifies the ledger's chain,
rebuilds the rows of every step with their tokens, inputs and labels, and compares all digests with
the records. It ends with status 1 and a line that names the first fault.

    python tests/independent/rebuild.py RUN_DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from order import WORD, Phase, cuts, order_ids, row_digests, sha
from record import Corpus, MismatchError, Record, read_ledger, require, sha256, token_ids


class Run:
    """All files of a run, compared with what order.json and START say of them."""

    def __init__(self, folder: Path) -> None:
        self.records = list(read_ledger(folder / "ledger"))
        self.order = json.loads((folder / "order.json").read_bytes())
        config = (folder / "config.yaml").read_bytes()
        self.config = yaml.safe_load(config)
        self.folder, data = folder, self.config["data"]
        tokenizer = Path(data["tokenizer"], "tokenizer.json").read_bytes()
        require(sha256(tokenizer) == self.order["tokenizer_sha256"], "another tokenizer.json")
        self.token_ids = token_ids(tokenizer)
        self.corpora = {name: Corpus(source["prefix"]) for name, source in data["sources"].items()}
        self._check_order()
        told = [r.payload for r in self.records if r.kind in ("START", "RESUME")]
        bound = told[-1].get("config_sha256")  # older versions have none
        require(bound in (None, sha256(config)), "config.yaml: not the one that the ledger binds")
        seed, entries = self.order["seed"], self.order["phases"]
        self.phases = [Phase(entry, seed, self.corpora) for entry in entries]

    def _check_order(self) -> None:
        ids = order_ids(self.order)
        require(ids == self.order["phase_ids"], "order.json: its phases have other ids")
        require(ids[-1] == self.order["order_id"], "order.json: its phases have another order_id")
        named = [
            record.payload["to"] if record.kind == "AMEND" else record.payload
            for record in self.records
            if record.kind in ("START", "RESUME", "AMEND")
        ]
        require(named[-1]["phase_ids"] == ids, "order.json: not the order that the ledger names")
        for pool in (pool for phase in self.order["phases"] for pool in phase["pools"]):
            for name in ("lengths_sha256", "tokens_sha256"):
                found = self.corpora[pool["source"]].hashes(name, pool["documents_in_file"])
                require(pool[name] in found, f"{pool['source']}: {name} is {' or '.join(found)}")


def check_step(run: Run, record: Record, start: dict[str, Any]) -> None:
    """Rebuild the rows of a step and compare the sums of their digests."""
    tokens, sums = 0, [0] * 5
    for g in range(record.g_begin, record.g_end):
        count, lanes = row_digests(g, run.phases[record.phase], run.corpora, start)
        tokens += count
        sums = add(sums, lanes)
    where = f"step {record.step}, rows [{record.g_begin}, {record.g_end})"
    require(tokens == record.n_tokens, f"{where}: {tokens} tokens, recorded {record.n_tokens}")
    for name, lane in (("order", slice(0, 2)), ("token", slice(2, 4)), ("mask", slice(4, 5))):
        require(sums[lane] == record.lanes[lane], f"{where}: another {name} digest")


def is_decision(skip: Record) -> bool:
    """Tell whether the run decided by itself to leave these rows out."""
    reason = skip.payload["reason"]
    decisions = ("trouble.on_nan", "trouble.on_spike")
    require(reason in ("data.skip_rows", *decisions), f"record {skip.seq}: no reason to skip")
    return reason in decisions


def check_skip(skip: Record) -> None:
    """Compare the rows of a SKIP record with those of its decision."""
    if is_decision(skip):
        first, end = skip.payload["rows"]
        where = f"record {skip.seq}: rows [{skip.g_begin}, {skip.g_end})"
        require(first <= skip.g_begin and skip.g_end <= end, f"{where} of another decision")


def add(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [(a + b) % WORD for a, b in zip(one, other, strict=True)]


def check_sums(run: Run, record: Record, tokens: int, sums: Sequence[int]) -> None:
    """Compare a CHECKPOINT or END record, and the checkpoint, with all steps before it."""
    said = {name: record.payload[name] for name in ("tokens", "order_digest", "token_digest")}
    digests = [f"{sums[high]:016x}{sums[high - 1]:016x}" for high in (1, 3)]
    require(list(said.values()) == [tokens, *digests], f"record {record.seq}: other sums")
    if record.kind == "END":
        return
    path = run.folder / "checkpoints" / record.payload["name"] / "state.json"
    if path.exists():
        state = json.loads(path.read_bytes())
        head = [state["ledger_seq"], state["ledger_chain"]]
        require(head == [record.seq, record.chain], f"{path}: of another record")
        where = [state["g"], state["step"], state["consumed_tokens"]]
        require(where == [record.g_end, record.step, tokens], f"{path}: of another step")
        check_files(path.parent, state, record.payload)


def check_files(folder: Path, state: dict[str, Any], payload: dict[str, Any]) -> None:
    """Compare a checkpoint's files with their list, and the list with the ledger."""
    listed = {state.get("files_sha256"), payload.get("files_sha256")}
    if listed == {None}:
        return  # both are of an older version
    require(listed == {sha(state["files"])}, f"{folder}: another list of files")
    for name, file in state["files"].items():
        content = (folder / name).read_bytes()
        found = {"bytes": len(content), "sha256": sha256(content)}
        require(found == file, f"{folder / name}: {found}, not {file}")


def rebuild(folder: Path) -> str:
    """Check a whole run; return what was found."""
    run = Run(folder)
    start: dict[str, Any] = {}
    steps = tokens = 0
    sums = [0] * 5
    for record in run.records:
        if record.kind in ("START", "RESUME"):
            start = record.payload
            require(start["token_ids"] == run.token_ids, "the tokenizer has other special ids")
        elif record.kind == "STEP":
            check_step(run, record, start)
            steps, tokens, sums = steps + 1, tokens + record.n_tokens, add(sums, record.lanes)
        elif record.kind in ("CHECKPOINT", "END"):
            check_sums(run, record, tokens, sums)
        elif record.kind == "SKIP":
            check_skip(record)
    kinds = {record.kind for record in run.records}
    if "END" in kinds and "RESUME" not in kinds:
        settings, skip_rows = run.config["phases"], run.config["data"]["skip_rows"]
        decided = [(r.g_begin, r.g_end) for r in run.records if r.kind == "SKIP" and is_decision(r)]
        planned = [
            cut
            for phase, setting in zip(run.phases, settings, strict=True)
            for cut in cuts(phase, setting, skip_rows, decided)
        ]
        taken = [r for r in run.records if r.kind in ("STEP", "SKIP")]
        require(planned == [(r.kind, r.g_begin, r.g_end) for r in taken], "other steps")
    head = run.records[-1]
    name = start["objective"]["name"]
    return f"{name}: {steps} steps, {tokens} tokens; head {head.chain} (record {head.seq})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", type=Path)
    try:
        print("PASS", rebuild(parser.parse_args().run_dir))
    except MismatchError as mismatch:
        sys.exit(f"FAIL {mismatch}")


if __name__ == "__main__":
    main()
