"""The run's ledger, written by the main rank: every step, and what happens between steps."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin import checkpoint, checkpoint_files, distributed
from megatron_ettin import config as configuration
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import RunConfig
from megatron_ettin.order import OrderSpec, PhaseSpec
from megatron_ettin.order.digest import format_digest
from megatron_ettin.order.ledger import Kind, LedgerWriter, described
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.rows import TokenIds
from megatron_ettin.training.metrics import Summary


class Recorder:
    """Appends to RUN_DIR/ledger on the main rank, and does nothing elsewhere."""

    def __init__(
        self,
        config: RunConfig,
        spec: OrderSpec,
        state: RunState,
        *,
        ids: TokenIds,
        is_amended: bool,
    ) -> None:
        """Open the ledger where `state` stands; records after it become a fork.

        Raises:
            LedgerError: another process writes it, it is damaged, or it ends before the checkpoint.
        """
        self._writer: LedgerWriter | None = None
        self._opening: list[tuple[Kind, dict[str, Any]]] = []
        if not distributed.is_main_rank() or state.g == spec.num_rows:
            return
        self._writer = LedgerWriter.open(
            RunFolder(Path(config.run_dir)).ledger,
            at=state.ledger_head,
            holding=_recorded(config, state),
        )
        is_new = self._writer.head.seq < 0
        description = _describe(config, spec, state, ids)
        self._opening = [(Kind.START if is_new else Kind.RESUME, description)]
        if is_amended:
            amended = {
                "from": {"phase_ids": state.phase_ids, "phase_ends": state.phase_ends},
                "to": {"phase_ids": spec.phase_ids(), "phase_ends": spec.phase_ends()},
            }
            self._opening.append((Kind.AMEND, amended))
        known = described(self._writer.events)
        if is_amended or known.get("config_sha256") != description["config_sha256"]:
            # Before order.json and config.yaml are written anew: the ledger binds them. Else its
            # last START or RESUME does so already.
            self._open(self._writer, state.step, state.g)

    def phase(self, state: RunState, index: int, phase: PhaseSpec) -> None:
        """Record that a phase begins."""
        payload = {"name": phase.name, "start_g": phase.start_g, "num_rows": phase.num_rows}
        self._event(Kind.PHASE, state, index, payload=payload)

    def steps(self, summary: Summary) -> None:
        """Record the steps of an interval."""
        if self._writer is None:
            return
        steps = summary.steps
        self._open(self._writer, steps[0].step - 1, steps[0].g_begin)
        self._writer.append_steps(
            step=np.array([s.step for s in steps], dtype=np.uint64),
            phase=np.array([s.phase for s in steps], dtype=np.uint32),
            g_begin=np.array([s.g_begin for s in steps], dtype=np.uint64),
            g_end=np.array([s.g_end for s in steps], dtype=np.uint64),
            n_tokens=np.array([s.tokens for s in steps], dtype=np.uint64),
            order_digest=summary.lanes[:, 0:2],
            token_digest=summary.lanes[:, 2:4],
            mask_digest=summary.lanes[:, 4],
        )

    def skip(self, state: RunState, phase: int, end: int) -> None:
        """Record that rows [state.g, end) are left out."""
        payload = {"reason": "data.skip_rows"}
        self._event(Kind.SKIP, state, phase, payload=payload, g_end=end)

    def checkpoint(self, state: RunState, name: str, files_sha256: str) -> RunState:
        """Record a checkpoint whose files are written; return the state it is to hold.

        The ledger is durable up to and including this record when the call returns.
        """
        payload = {**_checkpoint_payload(state, name), "files_sha256": files_sha256}
        self._event(Kind.CHECKPOINT, state, 0, payload=payload)
        if self._writer is None:
            return state
        head = self._writer.sync()
        return dataclasses.replace(state, ledger_seq=head.seq, ledger_chain=head.chain)

    def end(self, state: RunState) -> RunState:
        """Record the end of the run and close the ledger; return the state with this last record.

        A run that had ended before keeps the record that its state holds.
        """
        self._event(Kind.END, state, 0, payload=_digests(state))
        if self._writer is None:
            return state
        head = self._writer.sync()
        self._writer.close()
        return dataclasses.replace(state, ledger_seq=head.seq, ledger_chain=head.chain)

    def _event(
        self,
        kind: Kind,
        state: RunState,
        phase: int,
        *,
        payload: dict[str, Any],
        g_end: int | None = None,
    ) -> None:
        if self._writer is None:
            return
        self._open(self._writer, state.step, state.g)
        self._writer.append(
            kind,
            step=state.step,
            g_begin=state.g,
            g_end=state.g if g_end is None else g_end,
            phase=phase,
            payload=payload,
        )

    def _open(self, writer: LedgerWriter, step: int, g: int) -> None:
        """Say who goes on from row `g`; late, so that resuming in vain leaves no record."""
        opening, self._opening = self._opening, []
        for kind, payload in opening:
            writer.append(kind, step=step, g_begin=g, g_end=g, payload=payload)


def _describe(config: RunConfig, spec: OrderSpec, state: RunState, ids: TokenIds) -> dict[str, Any]:
    """Return what masks, dropout and initial weights follow from, and who computes."""
    _, size = distributed.data_parallel()
    return {
        "order_id": spec.order_id,
        "phase_ids": spec.phase_ids(),
        "phase_ends": spec.phase_ends(),
        "config_sha256": hashlib.sha256(configuration.to_yaml(config).encode()).hexdigest(),
        "objective": {
            "name": type(config.objective).__name__,
            **dataclasses.asdict(config.objective),
        },
        "seeds": dataclasses.asdict(config.seeds),
        "model": dataclasses.asdict(config.model),
        "token_ids": dataclasses.asdict(ids),
        "layout": {**dataclasses.asdict(config.hardware), "data_parallel_size": size},
        "versions": checkpoint.versions(),
        "host": platform.node(),
        "from_checkpoint": RunFolder(Path()).checkpoint(state.step).name if state.step else None,
        "initialized_from": state.initialized_from,
    }


def _recorded(config: RunConfig, state: RunState) -> dict[str, Any]:
    """Return what the ledger's record of the checkpoint that the run goes on from must hold."""
    if not state.step:
        return {}
    folder = RunFolder(Path(config.run_dir)).checkpoint(state.step)
    payload = _checkpoint_payload(state, folder.name)
    if config.checkpoint.check_files:
        payload["files_sha256"] = checkpoint_files.read_files(folder).sha256
    return payload


def _checkpoint_payload(state: RunState, name: str) -> dict[str, Any]:
    return {"name": name, "phase": state.phase, **_digests(state)}


def _digests(state: RunState) -> dict[str, Any]:
    return {
        "tokens": state.consumed_tokens,
        "order_digest": format_digest(state.order_digest),
        "token_digest": format_digest(state.token_digest),
    }
