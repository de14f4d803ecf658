"""A run's record of full size, made without training, and what attesting it costs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ettin.data.anchor import Anchor
from megatron_ettin.order import OrderSpec, PhaseSpec, PoolSpec
from megatron_ettin.order.digest import format_digest
from megatron_ettin.order.ledger import Head, Kind, LedgerWriter
from megatron_ettin.order.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
SOURCES = ("web", "code", "papers", "books", "wiki")
PHASES = ("stable", "long", "decay")
SEQ_LENGTH, STEP_ROWS = 1024, 3_328
#: Share of a row's slots that are no padding, so that 600,000 steps are 2.0T tokens.
STEP_TOKENS = STEP_ROWS * SEQ_LENGTH * 98 // 100
CHECKPOINTS = 600
#: Heads of a run of a month, one every ten minutes.
ANCHORED = 4_320


@dataclass(frozen=True)
class CommandCost:
    """Cost of one command."""

    wall_seconds: float
    cpu_seconds: float
    megabytes: float
    """Largest resident memory."""


def make_record(folder: Path, steps: int) -> list[Head]:
    """Write order.json, config.yaml and a ledger of so many steps; return heads to anchor."""
    run = RunFolder(folder)
    run.path.mkdir(parents=True)
    run.config.write_text("# the configuration of no run\n")
    spec = _spec(steps)
    run.order.write_text(spec.to_json())
    heads = []
    with LedgerWriter.open(run.ledger) as writer:
        start = {
            "order_id": spec.order_id,
            "phase_ids": spec.phase_ids(),
            "phase_ends": spec.phase_ends(),
            "config_sha256": hashlib.sha256(run.config.read_bytes()).hexdigest(),
            "objective": {"name": "CausalLM"},
            "seeds": {"order": 21, "mask": 21, "init": 21, "dropout": 21},
            "versions": {"megatron-ettin": "0", "torch": "0"},
        }
        writer.append(Kind.START, step=0, g_begin=0, g_end=0, payload=start)
        ends = {spec.phase_index(phase.start_g): phase for phase in spec.phases}
        for begin, count in _pieces(steps):
            g = begin * STEP_ROWS
            index = spec.phase_index(g)
            if ends[index].start_g == g:
                phase = ends[index]
                payload = {"name": phase.name, "start_g": g, "num_rows": phase.num_rows}
                at = {"step": begin, "g_begin": g, "g_end": g, "phase": index}
                writer.append(Kind.PHASE, **at, payload=payload)
            _append(writer, begin, count, index)
            done = begin + count
            end, lanes = done * STEP_ROWS, format_digest((done, done))
            payload = {"name": f"step_{done:08d}", "phase": PHASES[index], "files_sha256": "0" * 64}
            payload |= {"tokens": done * STEP_TOKENS, "order_digest": lanes, "token_digest": lanes}
            writer.append(Kind.CHECKPOINT, step=done, g_begin=end, g_end=end, payload=payload)
            heads.append(writer.sync())
    return heads


def anchor_heads(address: str, heads: list[Head]) -> None:
    """Write as many heads as a month of training does."""
    for number in range(ANCHORED):
        Anchor(address).add(heads[number * len(heads) // ANCHORED], "0" * 64)


def measure(folder: Path, steps: int) -> dict[str, float]:
    """Make a record, attest and verify it, each in a process of its own; return all figures."""
    run, key, public = folder / "run", folder / "key.pem", folder / "key.pub"
    heads = make_record(run, steps)
    anchor_heads(str(folder / "anchor"), heads)
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
    attestation, order = folder / "attestation.json", str(ROOT / "tools" / "order.py")
    commands = {
        "attest": [order, "attest", f"--run={run}", f"--key={key}", f"--output={attestation}"],
        "verify_attestation": [
            str(ROOT / "examples" / "verify_attestation.py"),
            *(f"--attestation={attestation}", f"--key={public}", f"--run={run}"),
        ],
        "verify_anchor": [order, "verify", f"--run={run}", "--chain", f"--anchor={folder}/anchor"],
    }
    figures: dict[str, float] = {"steps": steps, "tokens": steps * STEP_TOKENS}
    for name, command in commands.items():
        cost = cost_of(command)
        figures[f"{name}_wall_seconds"] = cost.wall_seconds
        figures[f"{name}_cpu_seconds"] = cost.cpu_seconds
        figures[f"{name}_megabytes"] = cost.megabytes
    figures["ledger_megabytes"] = (run / "ledger" / "records.led").stat().st_size / 1e6
    figures["attestation_kilobytes"] = attestation.stat().st_size / 1e3
    return figures


def cost_of(arguments: list[str]) -> CommandCost:
    """Run a Python program to its end; CalledProcessError if it fails."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    cpu = usage.ru_utime + usage.ru_stime
    return CommandCost(time.perf_counter() - begin, cpu, usage.ru_maxrss / 1024)


def _spec(steps: int) -> OrderSpec:
    rows = [steps * STEP_ROWS * share // 100 // STEP_ROWS * STEP_ROWS for share in (85, 12)]
    rows.append(steps * STEP_ROWS - sum(rows))
    phases, start_g = [], 0
    for name, num_rows in zip(PHASES, rows, strict=True):
        pools = tuple(_pool(source, num_rows) for source in SOURCES)
        phases.append(
            PhaseSpec(
                name=name,
                start_g=start_g,
                num_rows=num_rows,
                seq_length=SEQ_LENGTH,
                max_segments_per_row=SEQ_LENGTH // 16,
                pack="bfd",
                pools=pools,
            )
        )
        start_g += num_rows
    return OrderSpec(seed=21, tokenizer_sha256="0" * 64, phases=tuple(phases))


def _pool(source: str, rows: int) -> PoolSpec:
    tokens = rows * SEQ_LENGTH // len(SOURCES)
    return PoolSpec(
        source=source,
        documents_in_file=tokens // 750,
        tokens_in_file=tokens,
        lengths_sha256=hashlib.sha256(f"{source} lengths".encode()).hexdigest(),
        tokens_sha256=hashlib.sha256(f"{source} tokens".encode()).hexdigest(),
        first_document=0,
        end_document=tokens // 750,
        specials="add",
        min_doc_tokens=1,
        quota=1,
        rows=rows,
        tokens=tokens,
        drawn=0,
    )


def _pieces(steps: int) -> Iterator[tuple[int, int]]:
    """Yield (steps before, steps) of the stretches between two checkpoints or phases."""
    ends = {steps * number // CHECKPOINTS for number in range(1, CHECKPOINTS + 1)} - {0}
    ends |= {phase.start_g // STEP_ROWS for phase in _spec(steps).phases} - {0}
    begin = 0
    for end in sorted(ends):
        yield begin, end - begin
        begin = end


def _append(writer: LedgerWriter, begin: int, count: int, phase: int) -> None:
    """Append steps whose digests are all 1."""
    step = np.arange(begin + 1, begin + count + 1)
    one = np.ones((count, 2), dtype=np.uint64)
    g_end = step * STEP_ROWS
    tokens = np.full(count, STEP_TOKENS)
    phases = np.full(count, phase)
    writer.append_steps(step, phases, g_end - STEP_ROWS, g_end, tokens, one, one, one[:, 0])
