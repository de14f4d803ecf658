"""Compare a run's files with its ledger: order.json, config.yaml, metrics.jsonl, state.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.order import OrderSpec
from megatron_ettin.order.ledger import Kind, Ledger, find_description
from megatron_ettin.order.run_folder import STATE_FILE, RunFolder
from megatron_ettin.queries.answer import Check
from megatron_ettin.queries.branches import Branch
from megatron_ettin.queries.record import digest_hex
from megatron_ettin.queries.verify_checkpoints import check_checkpoint
from megatron_ettin.queries.verify_skips import KINDS, check_skips, skip_fault


@dataclass(frozen=True, kw_only=True)
class SideFiles:
    """Content of the files that a run writes after its ledger."""

    metrics: list[str]
    """Complete lines of metrics.jsonl."""
    states: dict[Path, bytes]
    """Bytes of each complete checkpoint's state.json, by path."""


def read_side_files(run: RunFolder) -> SideFiles:
    """Read metrics.jsonl and the state of every complete checkpoint."""
    states = [folder / STATE_FILE for folder in run.complete_checkpoints()]
    return SideFiles(
        metrics=run.metrics_lines(), states={state: state.read_bytes() for state in states}
    )


def check_folder(
    run: RunFolder, side_files: SideFiles, branches: list[Branch], check: Check
) -> None:
    """Compare a run's files with its ledger (the first of `branches`) and its forks."""
    ledger = branches[0].ledger
    _check_order_file(run, ledger, check)
    _check_config(run.config, ledger, check)
    check_skips(branches, check)
    _check_metrics(run.metrics, side_files.metrics, branches, check)
    for path, content in side_files.states.items():
        check_checkpoint(path, content, branches, check)


def _check_order_file(run: RunFolder, ledger: Ledger, check: Check) -> None:
    path = run.order
    try:
        spec = run.read_order()
    except (ValueError, OSError) as error:
        check.fail(str(error))
        return
    seq, agrees = _binding(ledger, lambda payload: payload.get("phase_ids") == spec.phase_ids())
    if agrees is None:
        check.notes.append(f"the run was ended before it wrote the order.json of record {seq}")
        return
    if not agrees:
        check.fail(f"{path}: its phase ids are not those that the ledger names", seq=seq)
        return
    if ledger.events[seq].get("order_id", spec.order_id) != spec.order_id:
        check.fail(f"{path}: its order_id is not the one that the ledger names", seq=seq)
    for seq, index, name, value in _planned(ledger):
        planned = getattr(spec.phases[index], name) if index < len(spec.phases) else "missing"
        if planned != value:
            what = f"{path}: phases[{index}]: {name} is {planned}, but the ledger says {value}"
            check.fail(what, seq=seq)
    _check_rows(path, spec, ledger, check)


def _planned(ledger: Ledger) -> Iterator[tuple[int, int, str, Any]]:
    """Yield (record, phase, field, value) for each field of a phase that the ledger fixes.

    A later START, RESUME or AMEND replaces the end of a phase.
    """
    ends: dict[int, tuple[int, int]] = {}
    for seq, payload in ledger.events.items():
        record = ledger.records[seq]
        if record["kind"] == Kind.PHASE:
            index = int(record["phase"])
            for name in ("name", "start_g"):
                yield seq, index, name, payload[name]
            ends[index] = seq, payload["start_g"] + payload["num_rows"]
        planned = payload["to"] if record["kind"] == Kind.AMEND else payload
        if "phase_ends" in planned:
            ends = {index: (seq, end) for index, end in enumerate(planned["phase_ends"])}
    for index, (seq, end) in ends.items():
        yield seq, index, "end_g", end


def _check_rows(path: Path, spec: OrderSpec, ledger: Ledger, check: Check) -> None:
    """Compare the rows of each STEP and SKIP record with the phase that the record names."""
    moves = ledger.records[np.isin(ledger.records["kind"], (Kind.STEP, Kind.SKIP))]
    phase = np.minimum(moves["phase"], len(spec.phases) - 1)
    starts = np.array([entry.start_g for entry in spec.phases], dtype=np.uint64)[phase]
    ends = np.array(spec.phase_ends(), dtype=np.uint64)[phase]
    wrong = (moves["phase"] != phase) | (moves["g_begin"] < starts) | (moves["g_end"] > ends)
    for record in moves[wrong]:
        rows = int(record["g_begin"]), int(record["g_end"])
        what = f"its rows do not lie in phase {record['phase']} as {path} has it"
        check.fail(what, seq=int(record["seq"]), rows=rows)
    last = ledger.records[-1]
    if last["kind"] == Kind.END and last["g_end"] != spec.num_rows:
        what = f"the run ended at row {last['g_end']}, but {path} has {spec.num_rows} rows"
        check.fail(what, seq=int(last["seq"]))


def _check_config(path: Path, ledger: Ledger, check: Check) -> None:
    """Compare config.yaml with the SHA-256 that the last START or RESUME holds."""
    expected = find_description(ledger.events).get("config_sha256")
    if expected is None:
        check.notes.append("the ledger does not bind config.yaml: an earlier version wrote it")
        return
    config_sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    # A RESUME of an earlier version has no hash: any file may be the one from before it.
    seq, agrees = _binding(
        ledger, lambda payload: payload.get("config_sha256") in (config_sha256, None)
    )
    if agrees is None:
        check.notes.append(f"the run was ended before it wrote the config.yaml of record {seq}")
    elif not agrees:
        state = "is gone" if config_sha256 is None else f"its SHA-256 is {config_sha256}"
        check.fail(
            f"{path}: {state}, but the ledger says {expected}; restore it: the checkpoints that "
            f"were saved after this record hold copies",
            seq=seq,
        )


def _binding(ledger: Ledger, agrees: Callable[[dict[str, Any]], bool]) -> tuple[int, bool | None]:
    """Return the last START or RESUME record, and whether a file of the run agrees with it.

    A run writes the record first, then the file, then takes a step. Until that step the file may
    still be the one of the record before, or missing in a new run; None says that it is.
    """
    told = [(seq, payload) for seq, payload in ledger.events.items() if "objective" in payload]
    if not told:
        return 0, False
    (seq, payload), *earlier = reversed(told)
    if agrees(payload):
        return seq, True
    has_steps = bool((ledger.steps["seq"] > seq).any())
    return seq, False if has_steps or (earlier and not agrees(earlier[0][1])) else None


def _check_metrics(path: Path, lines: list[str], branches: list[Branch], check: Check) -> None:
    """Compare the reports of each step in metrics.jsonl with the ledger or a fork."""
    undone = 0
    for number, line in enumerate(lines, start=1):
        try:
            said = json.loads(line)
            step = int(said["step"])
        except (ValueError, KeyError, TypeError) as error:
            check.fail(f"{path}, line {number}: not what a run reports ({error})")
            continue
        check.items += 1
        if said.get("kind") in KINDS:
            if fault := skip_fault(said, branches):
                check.fail(f"{path}, line {number}: {fault}")
            continue
        if _metrics_fault(said, branches[0], step) == "":
            continue
        answers = [_metrics_fault(said, branch, step) for branch in branches]
        known = [answer for answer in answers if answer is not None]
        # A run that goes back cuts its ledger first and metrics.jsonl later. Until then, lines may
        # report steps that are in a fork.
        if "" in known:
            undone += 1
        elif known:
            check.fail(f"{path}, line {number}: step {step}: {known[0]}")
        else:
            check.fail(
                f"{path}, line {number}: reports step {step}, which the ledger does not have: its "
                f"end was cut off, or lost with the machine's power"
            )
    if undone:
        check.notes.append(f"{undone} lines of metrics.jsonl are of steps that are in forks")


def _metrics_fault(said: dict[str, Any], branch: Branch, step: int) -> str | None:
    """Return how a report differs from a branch's step; "" if equal, None without such a step."""
    index = branch.index_of_step(step)
    if index is None:
        return None
    sums = branch.sums_of(index + 1)
    recorded: dict[str, Any] = {
        "g": int(branch.ledger.steps["g_end"][index]),
        "tokens": sums.tokens,
        "token_digest": digest_hex(sums.token_digest),
    }
    return next(
        (
            f"{name} is {said[name]}, but the ledger has {value}"
            for name, value in recorded.items()
            if name in said and said[name] != value
        ),
        "",
    )
