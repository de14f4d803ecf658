"""Programs that follow a run beside metrics.jsonl, by a flag each: W&B and TensorBoard."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import RunConfig, to_yaml
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.publication import publish_text


class Tracker(Protocol):
    """Receiver of the numbers in each line of metrics.jsonl."""

    def log(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        """Take the numbers of a line of `kind` (train, validation) after `step`."""

    def close(self, *, failed: bool) -> None:
        """Write what is left and end; `failed` if the run ends by an error."""


def open_trackers(config: RunConfig, order_id: str, state: RunState) -> list[Tracker]:
    """Open those that the configuration asks for, at the state that the run starts from."""
    trackers: list[Tracker] = []
    if config.logging.wandb:
        trackers.append(WandbTracker(config, order_id, state))
    if config.logging.tensorboard:
        trackers.append(TensorBoardTracker(RunFolder(Path(config.run_dir)), state))
    return trackers


class WandbTracker:
    """A Weights & Biases run; its id is in the run folder, so that a resumed run continues it."""

    def __init__(self, config: RunConfig, order_id: str, state: RunState) -> None:
        """Begin a W&B run, or continue that of the run folder."""
        import wandb

        folder = RunFolder(Path(config.run_dir))
        self._run: Any = wandb.init(
            dir=config.run_dir,
            name=folder.path.name,
            id=_wandb_id(folder, state),
            resume="allow",
            config=wandb_config(config, order_id),
        )

    def log(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        """Log the numbers; W&B ignores steps that it has already, which a resumed run repeats."""
        self._run.log(dict(numbers), step=step)

    def close(self, *, failed: bool) -> None:
        """Finish the W&B run."""
        self._run.finish(exit_code=1 if failed else 0)


def wandb_config(config: RunConfig, order_id: str) -> dict[str, Any]:
    """Return the fields of a run by section, and its order id, for W&B's table of runs.

    W&B names a field by dots (`optimizer.lr`) and sorts by it, but only through mappings. So the
    phases, a list, become a mapping by name.
    """
    sections: dict[str, Any] = yaml.safe_load(to_yaml(config))
    phases = {phase["name"]: phase for phase in sections["phases"]}
    return {**sections, "phases": phases, "order_id": order_id}


def _wandb_id(folder: RunFolder, state: RunState) -> str:
    """Return the id of the run to continue; of a new one before the first checkpoint."""
    if state.step and folder.wandb_id.is_file():
        return folder.wandb_id.read_text().strip()
    identity = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    folder.path.mkdir(parents=True, exist_ok=True)
    publish_text(folder.wandb_id, identity + "\n")
    return identity


class TensorBoardTracker:
    """Event files in run_dir/tensorboard: a chart for each number, `train/loss` for example."""

    def __init__(self, folder: RunFolder, state: RunState) -> None:
        """Open a file; TensorBoard then hides the steps after `state` of an interrupted run."""
        from torch.utils.tensorboard import SummaryWriter

        # Untyped in torch.
        writer: Any = SummaryWriter
        self._writer = writer(str(folder.tensorboard), purge_step=state.step + 1)

    def log(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        """Add a point to each chart, and write it out: a run may be killed."""
        for name, value in numbers.items():
            self._writer.add_scalar(f"{kind}/{name}", value, global_step=step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        self._writer.close()
