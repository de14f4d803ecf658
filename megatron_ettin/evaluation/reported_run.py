"""One run of a report: content of its folder, and measurements on its weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ettin.config import RunConfig
from megatron_ettin.evaluation.probe import Accuracy
from megatron_ettin.evaluation.run_curves import RunCurves, read_curves
from megatron_ettin.evaluation.samples import Sample
from megatron_ettin.evaluation.unigram import unigram_loss
from megatron_ettin.model.counts import parameters
from megatron_ettin.objectives import Objective, all_measure_text
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.training.validation import HeldOutLoss

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements on the weights of a run's newest checkpoint."""

    step: int
    """Step of the checkpoint."""
    probe: Accuracy | None = None
    untrained_probe: Accuracy | None = None
    """The same with the weights that the run started from."""
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """A run, finished or not."""

    folder: Path
    config: RunConfig
    curves: RunCurves
    num_rows: int
    """Rows of the whole run, those to come included."""
    unigram: HeldOutLoss | None = None
    """None without a held-out loss, or where the corpora are gone."""
    measured: Measured | None = None
    """None if neither a probe nor samples were asked for."""

    @property
    def name(self) -> str:
        """Name of the run in the report."""
        return self.curves.name

    @property
    def last(self) -> Any:
        """Last line of metrics.jsonl about training."""
        return self.curves.training[-1]

    @property
    def objective(self) -> Objective:
        """Objective of the phase last trained."""
        return self.config.objective.for_phase(str(self.last["phase"]))

    @property
    def measures_text(self) -> bool:
        """True if its losses are -log p(text), or bounds of it, in nats per token."""
        return all_measure_text(self.objective)

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, embeddings included."""
        return parameters(self.config.model).total

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on, by the time of the steps."""
        return self.curves.tokens / self.curves.seconds

    @property
    def token_digest(self) -> str:
        """Digest of the tokens consumed; equal for runs that consumed the same."""
        return str(self.last["token_digest"])

    @property
    def held_out(self) -> HeldOutLoss | None:
        """Return the last held-out loss."""
        if not self.curves.validation:
            return None
        last = self.curves.validation[-1]
        return HeldOutLoss(
            loss=last["heldout_loss"],
            standard_error=last["heldout_standard_error"],
            scored_tokens=last["scored_tokens"],
        )


def read_run(name: str, folder: Path) -> ReportedRun:
    """Read a run's folder, and compute the unigram loss beside its held-out loss.

    Raises:
        ValueError, OSError: a file, which the message names, is missing or damaged.
    """
    run = RunFolder(folder)
    curves, config = read_curves(name, folder), run.read_config()
    unigram = _unigram(name, config) if curves.validation else None
    return ReportedRun(
        folder=folder,
        config=config,
        curves=replace(curves, unigram=unigram.loss if unigram else None),
        num_rows=run.read_order(check_ids=False).num_rows,
        unigram=unigram,
    )


def _unigram(name: str, config: RunConfig) -> HeldOutLoss | None:
    try:
        return unigram_loss(config)
    except OSError as error:
        logger.warning("%s: without a unigram loss, because its corpora are gone: %s", name, error)
        return None
