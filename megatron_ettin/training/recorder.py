"""Recorder of a run: the main rank writes every step, and events between steps, to the ledger."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_ettin import checkpoint_files, distributed
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import RunConfig
from megatron_ettin.order import OrderSpec, PhaseSpec
from megatron_ettin.order.digest import format_digest
from megatron_ettin.order.interventions import CONFIGURED, Intervention
from megatron_ettin.order.ledger import Head, Kind, LedgerError, LedgerWriter, find_description
from megatron_ettin.order.ledger.lock import lock_ledger
from megatron_ettin.order.row_loss_writer import RowLossWriter
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.rows import TokenIds
from megatron_ettin.training.anchoring import Anchoring, open_anchoring
from megatron_ettin.training.late_writes import LateWrites
from megatron_ettin.training.preparation import MASK_LANE, ORDER_LANES, TOKEN_LANES, StepRange
from megatron_ettin.training.start_record import describe_run

T = TypeVar("T")


def open_recorder(
    config: RunConfig, spec: OrderSpec, state: RunState, *, ids: TokenIds, is_amended: bool
) -> Recorder:
    """Open the run's ledger at `state`, on the main rank; later records become a fork.

    Raises:
        LedgerError: another process writes it, it is damaged, or it ends before the checkpoint.
        StartError: its anchor does not answer, or holds heads of another run.
    """
    writer, lock, anchoring, losses = None, None, None, None
    run = RunFolder(Path(config.run_dir))
    ledger = run.ledger
    if distributed.is_main_rank() and state.g < spec.num_rows:
        writer = LedgerWriter.open(ledger, at=state.ledger_head, holding=_recorded(config, state))
        try:
            is_on = config.logging.row_losses
            losses = RowLossWriter.open(ledger, state.g, fork=writer.fork, is_on=is_on)
            anchoring = open_anchoring(config.logging, run)
        except BaseException:
            writer.close()
            raise
    elif distributed.is_main_rank() and ledger.is_dir():
        # A run that has ended already gets no further record. But its other files are written
        # anew, which nobody else may do meanwhile.
        lock = lock_ledger(ledger)
    _, size = distributed.data_parallel()
    description = describe_run(config, spec, state, ids, data_parallel_size=size)
    return Recorder(
        writer,
        description,
        spec,
        state,
        is_amended=is_amended,
        lock=lock,
        anchoring=anchoring,
        losses=losses,
    )


class Recorder:
    """Appends to the ledger of a run; does nothing on the ranks without a writer.

    While a checkpoint is pending, records of later steps wait in memory: the record of the
    checkpoint comes right after the last step that it contains. Records also wait while the disk
    refuses them.
    """

    def __init__(
        self,
        writer: LedgerWriter | None,
        description: dict[str, Any],
        spec: OrderSpec,
        state: RunState,
        *,
        is_amended: bool,
        lock: int | None = None,
        anchoring: Anchoring | None = None,
        losses: RowLossWriter | None = None,
    ) -> None:
        """Take a ledger that is open at `state`.

        Args:
            writer: the open ledger; None where nothing is to be written.
            description: payload of the START or RESUME record (`describe_run`).
            spec: the order from here on.
            state: the run's state, with the phases that were planned so far.
            is_amended: `spec` plans other rows than `state` did.
            lock: descriptor that holds the ledger's lock for a run without a writer.
            anchoring: where heads of the ledger are written besides; None if nowhere.
            losses: file of the rows' losses, open at the same row; None if none are kept.
        """
        self._writer = writer
        self._anchoring = anchoring
        self._losses = losses
        self._lock = lock
        self._opening: list[tuple[Kind, dict[str, Any]]] = []
        self._held: list[Callable[[], None]] | None = None  # appends after a pending checkpoint's
        if writer is None:
            return
        self._late = LateWrites(writer.folder)
        is_new = writer.head.seq < 0
        self._opening = [(Kind.START if is_new else Kind.RESUME, description)]
        if is_amended:
            amended = {
                "from": {"phase_ids": state.phase_ids, "phase_ends": state.phase_ends},
                "to": {"phase_ids": spec.phase_ids(), "phase_ends": spec.phase_ends()},
            }
            self._opening.append((Kind.AMEND, amended))
        known = find_description(writer.events)
        if is_amended or known.get("config_sha256") != description["config_sha256"]:
            # The ledger must bind order.json and config.yaml before they are written anew. With the
            # same configuration its last START or RESUME binds them already.
            self._open(writer, state.step, state.g)
            self._late.settle()

    def record_phase(self, state: RunState, index: int, phase: PhaseSpec) -> None:
        """Record that a phase begins."""
        payload = {"name": phase.name, "start_g": phase.start_g, "num_rows": phase.num_rows}
        self._append(Kind.PHASE, state, index, payload=payload)

    def record_steps(
        self,
        steps: Sequence[StepRange],
        lanes: NDArray[np.uint64],
        row_losses: NDArray[np.void] | None = None,
    ) -> None:
        """Record n > 0 steps with the sums of their digests over all ranks, `lanes` [n, LANES].

        `row_losses` are the entries of all their rows, if the run keeps them.
        """
        if self._writer is None:
            return
        self._open(self._writer, steps[0].step - 1, steps[0].g_begin)
        if self._losses is not None and row_losses is not None:
            self._add(partial(self._losses.write, steps[0].g_begin, row_losses))
        self._add(
            partial(
                self._writer.append_steps,
                step=np.array([s.step for s in steps], dtype=np.uint64),
                phase=np.array([s.phase for s in steps], dtype=np.uint32),
                g_begin=np.array([s.g_begin for s in steps], dtype=np.uint64),
                g_end=np.array([s.g_end for s in steps], dtype=np.uint64),
                n_tokens=np.array([s.tokens for s in steps], dtype=np.uint64),
                order_digest=lanes[:, ORDER_LANES],
                token_digest=lanes[:, TOKEN_LANES],
                mask_digest=lanes[:, MASK_LANE],
            )
        )
        if self._anchoring is not None and self._anchoring.is_due:
            self._anchor(_sync(self._writer.sync, self._writer.folder))

    def record_skip(
        self, state: RunState, phase: int, end: int, intervention: Intervention | None = None
    ) -> None:
        """Record that rows [state.g, end) are skipped: by the configuration, or a decision.

        A decision is durable when the call returns, so that what follows from it may begin; no
        checkpoint may be pending then.

        Raises:
            OSError, LedgerError: the disk refuses the record of a decision; the run must end.
        """
        if self._writer is not None and self._losses is not None:
            self._open(self._writer, state.step, state.g)
            self._add(partial(self._losses.leave_out, state.g, end))
        if intervention is None:
            payload: dict[str, Any] = {"reason": CONFIGURED}
            self._append(Kind.SKIP, state, phase, payload=payload, g_end=end)
            return
        self._append(Kind.SKIP, state, phase, payload=intervention.payload(), g_end=end)
        if self._writer is not None:
            self._late.settle()
            self._anchor(_sync(self._writer.sync, self._writer.folder))

    def record_checkpoint(self, state: RunState, name: str, files_sha256: str) -> RunState:
        """Record a checkpoint whose files are written; return the state to save in it.

        The ledger is durable up to and including this record when the call returns. Records since
        `hold` come after it, with `release`.

        Raises:
            OSError: the disk refuses this record or one before it. The checkpoint has no record
                then, and the same may be tried again later.
            LedgerError: the disk has lost what it had taken; the run must end.
        """
        payload = {**_checkpoint_payload(state, name), "files_sha256": files_sha256}
        return self._append_durably(Kind.CHECKPOINT, state, payload)

    def record_end(self, state: RunState) -> RunState:
        """Record the end of the run and close the ledger; return the state with this last record.

        A run that had ended before has no writer and keeps the record that its state names.

        Raises:
            OSError, LedgerError: as `record_checkpoint` does.
        """
        state = self._append_durably(Kind.END, state, _digests(state))
        self.close()
        return state

    def close(self) -> None:
        """Close the ledger of a run that stops, after the record of a checkpoint or a decision."""
        if self._writer is not None:
            self._late.settle()
            self._writer.close()
            if self._losses is not None:
                self._losses.close()
        if self._anchoring is not None:
            self._anchoring.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def hold(self) -> None:
        """Keep the records that follow in memory, as the record of a checkpoint is still due."""
        self._held = []

    def release(self) -> None:
        """Append the records since `hold`."""
        held, self._held = self._held or [], None
        for append in held:
            self._late.write(append)

    def _append(
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
        end = state.g if g_end is None else g_end
        at: dict[str, Any] = {"step": state.step, "g_begin": state.g, "g_end": end, "phase": phase}
        self._add(partial(self._writer.append, kind, **at, payload=payload))

    def _add(self, append: Callable[[], None]) -> None:
        """Append a record when its turn comes: now, as a rule."""
        if self._held is None:
            self._late.write(append)
        else:
            self._held.append(append)

    def _append_durably(self, kind: Kind, state: RunState, payload: dict[str, Any]) -> RunState:
        """Append a record that is not kept in memory; return the state with it as its last."""
        if self._writer is None:
            return state
        self._open(self._writer, state.step, state.g)
        self._late.settle()
        losses = self._losses if kind == Kind.CHECKPOINT else None
        if losses is not None:
            payload = {**payload, "row_losses": losses.describe(state.g)}
            _sync(losses.sync, losses.path)
        self._writer.append(kind, step=state.step, g_begin=state.g, g_end=state.g, payload=payload)
        head = _sync(self._writer.sync, self._writer.folder)
        self._anchor(head)
        if losses is not None:
            losses.begin_after_checkpoint(state.g)
        return dataclasses.replace(state, ledger_seq=head.seq, ledger_chain=head.chain)

    def _anchor(self, head: Head) -> None:
        """Write a durable head to the anchor, if there is one."""
        if self._anchoring is not None and head.seq >= 0:  # the disk may refuse even START
            self._anchoring.add(head)

    def _open(self, writer: LedgerWriter, step: int, g: int) -> None:
        """Write the START or RESUME that is due; late, so that a resume that fails leaves none."""
        opening, self._opening = self._opening, []
        for kind, payload in opening:
            at = {"step": step, "g_begin": g, "g_end": g}
            self._late.write(partial(writer.append, kind, **at, payload=payload))


def _sync(sync: Callable[[], T], path: Path) -> T:
    """Make durable what was written to `path`; LedgerError if the disk has lost some of it."""
    try:
        return sync()
    except OSError as error:
        # Some systems take writes and lose them afterwards: more would follow a hole.
        raise LedgerError(
            f"{path}: the disk has lost records ({error.strerror}): make room and resume "
            f"from the last checkpoint"
        ) from error


def _recorded(config: RunConfig, state: RunState) -> dict[str, Any]:
    """Return fields that the ledger's record of the resumed checkpoint must have."""
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
