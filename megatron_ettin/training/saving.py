"""Checkpoints of a run, saved beside its training: at most one is pending."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_ettin import checkpoint, distributed
from megatron_ettin.checkpoint import PendingCheckpoint, RunState
from megatron_ettin.config import RunConfig
from megatron_ettin.file_digests import FileList
from megatron_ettin.model.ettin_model import EttinModel
from megatron_ettin.order.ledger import Head
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.publication import publish_folder
from megatron_ettin.shard_saver import ShardSaver
from megatron_ettin.shards import ShardsError
from megatron_ettin.training.keeper import Keeper
from megatron_ettin.training.metrics import Reporter, SavedCheckpoint
from megatron_ettin.training.recorder import Recorder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pending:
    checkpoint: PendingCheckpoint
    state: RunState
    """State of the run at the save."""
    began: float
    """Time of the save."""
    stall_seconds: float
    """Time that training waited before it went on."""


class Saver:
    """Saves a run's checkpoints; all ranks call it, and all get the same answers.

    While a checkpoint is pending, the recorder holds back the records of later steps.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: EttinModel,
        optimizer: MegatronOptimizer,
        *,
        recorder: Recorder,
        reporter: Reporter,
        keeper: Keeper,
    ) -> None:
        """Begin with no checkpoint pending."""
        self._config, self._stage, self._optimizer = config, stage, optimizer
        self._recorder, self._reporter, self._keeper = recorder, reporter, keeper
        self._folder = RunFolder(Path(config.run_dir))
        self._writer = ShardSaver()
        self._pending: _Pending | None = None
        self._copy_seconds = 0.0  # time that an update waited for the pending copy
        self._head: Head | None = None
        self._refusal: Exception | None = None

    @property
    def is_written(self) -> bool:
        """A checkpoint is pending, and this rank has written its part of it."""
        return self._pending is not None and self._pending.checkpoint.shards.is_written

    @property
    def is_owed(self) -> bool:
        """The last save failed: the run saves again at its next line of metrics.jsonl."""
        return self._refusal is not None

    def begin(self, state: RunState) -> None:
        """Begin to copy and write the state; wait for the checkpoint before, if it is pending.

        `wait_for_copy` must be called before the state changes.

        A disk that refuses is logged as an error, and the save is owed then.
        """
        self.wait()
        began = time.perf_counter()
        folder = self._folder.checkpoint(state.step)
        self._refusal = None
        try:
            pending = checkpoint.begin(
                folder,
                self._stage,
                self._optimizer,
                self._writer,
                config=self._config,
                state=state,
            )
        except (ShardsError, OSError) as error:
            self._refused(folder, error)
            return
        self._recorder.hold()
        self._pending = _Pending(pending, state, began, time.perf_counter() - began)
        self._copy_seconds = 0.0

    def wait_for_copy(self) -> None:
        """Wait until weights and optimizer state may change, if a save still copies them."""
        if self._pending is not None:
            began = time.perf_counter()
            self._pending.checkpoint.shards.wait_for_copy()
            self._copy_seconds += time.perf_counter() - began

    def wait(self) -> None:
        """Publish the pending checkpoint, if there is one: wait for all ranks' threads before.

        When the call returns nothing is pending, and the ledger holds all records.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            self._publish(pending)
        except (ShardsError, OSError) as error:
            self._refused(pending.checkpoint.folder, error)
        self._recorder.release()

    def finish(self, state: RunState) -> RunState:
        """Wait for the last checkpoint of a run; return `state` with the head of the ledger.

        Raises:
            ShardsError, OSError: the disk refused the last save.
        """
        self.wait()
        if self._refusal is not None:
            raise self._refusal
        if self._head is None:
            return state
        return dataclasses.replace(state, ledger_seq=self._head.seq, ledger_chain=self._head.chain)

    def _publish(self, pending: _Pending) -> None:
        """Complete a checkpoint's files and give them their name."""
        began = time.perf_counter()
        files = pending.checkpoint.complete()
        self._head = distributed.from_main_rank(lambda: self._name(pending, files, began))
        self._keeper.note_published()

    def _name(self, pending: _Pending, files: FileList, began: float) -> Head | None:
        """Write the ledger's record of a checkpoint's files, its state, its line, then its name.

        In this order a checkpoint never knows more than the ledger, and none lacks its line,
        wherever a crash comes. Return the head of the ledger.
        """
        folder = pending.checkpoint.folder
        self._reporter.settle()
        state = self._recorder.record_checkpoint(pending.state, folder.name, files.sha256)
        checkpoint.add_state(folder, files, state)
        now = time.perf_counter()
        saved = SavedCheckpoint(
            folder=folder,
            num_bytes=pending.checkpoint.shards.num_bytes,
            stall_seconds=pending.stall_seconds + self._copy_seconds + now - began,
            seconds=now - pending.began,
        )
        self._reporter.report_saved(pending.state, saved)
        self._reporter.settle()
        publish_folder(folder)
        logger.info(
            "saved %s in %.1f s (training waited %.1f s)",
            *(folder, saved.seconds, saved.stall_seconds),
        )
        return state.ledger_head

    def _refused(self, folder: Path, error: ShardsError | OSError) -> None:
        """Say why a save failed, remove what it has written, and owe it."""
        checkpoint.discard(folder)
        self._refusal = error
        if distributed.is_main_rank():
            logger.error(
                "%s was not saved: %s. Training goes on, and tries again at its next report",
                folder,
                error,
            )
