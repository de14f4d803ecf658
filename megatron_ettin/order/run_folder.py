"""The files of a run's folder, and what they hold; reads no corpus and no weights.

Training writes the folder, and questions, reports and comparisons read it, all through this module.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin.order.ledger import Ledger
from megatron_ettin.order.row_losses import LOSSES_FILE
from megatron_ettin.order.spec import OrderSpec
from megatron_ettin.publication import is_unfinished, rename_durably

if TYPE_CHECKING:
    from megatron_ettin.config import RunConfig

#: The run's configuration; a checkpoint holds a copy under the same name.
CONFIG_FILE = "config.yaml"
#: A checkpoint's last file: a checkpoint without it is not complete.
STATE_FILE = "state.json"
#: Kind of the lines of metrics.jsonl that name a checkpoint which the run removes.
REMOVED = "removed"
_SET_ASIDE = ".damaged"


@dataclass(frozen=True)
class RunFolder:
    """The `run_dir` of a run; nothing is read before a method asks for it."""

    path: Path

    @property
    def config(self) -> Path:
        """The run's configuration, or the description of a run that Megatron trained."""
        return self.path / CONFIG_FILE

    @property
    def order(self) -> Path:
        """Identity of the run's sample order."""
        return self.path / "order.json"

    @property
    def ledger(self) -> Path:
        """Folder of the ledger."""
        return self.path / "ledger"

    @property
    def row_losses(self) -> Path:
        """Loss of every row, if the run keeps them."""
        return self.ledger / LOSSES_FILE

    @property
    def metrics(self) -> Path:
        """Reports of training and validation, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def wandb_id(self) -> Path:
        """Id of the Weights & Biases run that a resumed run continues."""
        return self.path / "wandb_id.txt"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def stop(self) -> Path:
        """File by whose presence somebody asks the run to save and to end after its step."""
        return self.path / "stop"

    @property
    def hangs(self) -> Path:
        """Folder of the stacks of ranks that hung."""
        return self.path / "hangs"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step`, be it there or not."""
        return self.checkpoints / f"step_{step:08d}"

    def complete_checkpoints(self) -> list[Path]:
        """Return the folders of all checkpoints that were saved whole, sorted by name."""
        # A save writes the state last, and then gives the folder its name.
        folders = [state.parent for state in self.checkpoints.glob(f"*/{STATE_FILE}")]
        return sorted(path for path in folders if not (is_unfinished(path) or is_set_aside(path)))

    def newest_checkpoint(self) -> Path | None:
        """Return the complete checkpoint with the most steps, if there is one."""
        named = [path for path in self.complete_checkpoints() if step_of(path) is not None]
        return max(named, key=lambda path: step_of(path) or 0, default=None)

    def set_aside_checkpoints(self) -> list[Path]:
        """Return the damaged checkpoints that starts have renamed, sorted by name."""
        return sorted(path for path in self.checkpoints.glob("*") if is_set_aside(path))

    def removed_checkpoints(self) -> set[str]:
        """Return the names of the checkpoints that the run itself has removed (`keep`).

        Lines of metrics.jsonl that are no JSON are passed over.
        """
        names = set()
        for line in self.metrics_lines():
            if f'"{REMOVED}"' in line:
                with suppress(ValueError, KeyError, TypeError):
                    report = json.loads(line)
                    if report["kind"] == REMOVED:
                        names.add(str(report["checkpoint"]))
        return names

    def read_config(self) -> RunConfig:
        """Read the configuration.

        Raises:
            ValueError, OSError: naming the file, and the field that is wrong.
        """
        # The parser takes longer to import than a question about a ledger takes to answer.
        from megatron_ettin.config import load_config

        return load_config(self.config)

    def read_order(self, *, check_ids: bool = True) -> OrderSpec:
        """Read order.json.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged; with `check_ids` also if its ids do not follow from its
                content, or its phases leave a gap.
        """
        if not self.order.is_file():
            raise FileNotFoundError(f"{self.order}: no such file; --run takes the run_dir of a run")
        try:
            return OrderSpec.from_json(self.order.read_bytes(), check_ids=check_ids)
        except ValueError as error:
            raise ValueError(f"{self.order}: {error}") from error

    def begun_order(self) -> OrderSpec | None:
        """Read order.json if there is a checkpoint to go on from; None if it is damaged too.

        A start compares it with the order of the configuration, and reports a damaged one.
        """
        if self.newest_checkpoint() is None or not self.order.is_file():
            return None
        try:
            return self.read_order(check_ids=False)
        except ValueError:
            return None

    def has_ledger(self) -> bool:
        """Say whether a ledger was begun; not so before the first step, nor by Megatron."""
        return self.ledger.is_dir()

    def read_ledger(self) -> Ledger:
        """Read and verify the ledger.

        Raises:
            FileNotFoundError: there is none.
            LedgerError: naming file, record and byte of the first fault.
        """
        if not self.has_ledger():
            raise FileNotFoundError(
                f"{self.ledger}: no such folder; only runs of this project that have begun keep a "
                f"ledger"
            )
        return Ledger.read(self.ledger)

    def metrics_lines(self) -> list[str]:
        """Return the complete lines of metrics.jsonl, without their ends; none if it is missing.

        A last line without an end is still being written, or its writer was killed.
        """
        if not self.metrics.is_file():
            return []
        text = self.metrics.read_text(errors="replace")
        return text[: text.rfind("\n") + 1].splitlines()

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return what every line of metrics.jsonl reports, even a last one without an end.

        Raises:
            OSError: the file cannot be read.
            ValueError: naming the line that is not JSON.
        """
        reports = []
        for number, line in enumerate(self.metrics.read_text().splitlines(), start=1):
            try:
                reports.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{self.metrics}:{number}: not JSON: {error}") from error
        return reports


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint durably, so that its step can be saved again; return its path."""
    names = [f"{checkpoint.name}{_SET_ASIDE}"]
    while (aside := checkpoint.with_name(names[-1])).exists():
        names.append(f"{names[0]}-{len(names) + 1}")
    rename_durably(checkpoint, aside)
    return aside


def is_set_aside(path: Path) -> bool:
    """Tell whether a folder has the name of a damaged checkpoint that was set aside."""
    return path.suffix.partition("-")[0] == _SET_ASIDE


def step_of(checkpoint: Path) -> int | None:
    """Return the step that a checkpoint's folder is named after, None for other names."""
    named = re.fullmatch(r"step_(\d+)", checkpoint.name)
    return int(named[1]) if named else None
